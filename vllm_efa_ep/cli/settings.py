"""``vllm-efa-ep settings``: every setting, for people or as the text of docs/settings.md."""

import argparse
import sys

from vllm_efa_ep.config import SETTINGS, settings_markdown

NAME = "settings"
HELP = "list every setting"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--markdown", action="store_true", help="as the text of docs/settings.md")


def run(options: argparse.Namespace) -> int:
    """Print the settings."""
    sys.stdout.write(settings_markdown() if options.markdown else _text())
    return 0


def _text() -> str:
    return "".join(
        f"{setting.variable} ({setting.kind}, default {setting.default!r}"
        f"{', ' + setting.unit if setting.unit else ''})\n    {setting.meaning}\n"
        for setting in SETTINGS
    )
