"""What MkDocs builds beside the pages of this folder: the first page, and the reference of the command line.

Both are made at build time from what they describe (README.md, ``vllm_efa_ep.cli.parser()``).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from vllm_efa_ep.cli import parser

REPOSITORY = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are generated, and list the pages that ``nav`` forgot."""
    generated = {
        "index.md": at_the_root("README.md"),
        "contributing.md": at_the_root("CONTRIBUTING.md"),
        "reference/cli.md": "\n".join(command_line()),
    }
    examples = REPOSITORY / "examples"
    for linked in (*examples.glob("*/README.md"), *examples.glob("grafana/*.json")):
        name = str(linked.relative_to(REPOSITORY))
        generated[name] = at_the_root(name).replace("](../../docs/", "](../../")
    for path, content in generated.items():
        files.append(File.generated(config, path, content=content))
    listed = set(pages_of(config.nav))
    others = sorted(file.src_uri for file in files.documentation_pages() if file.src_uri not in listed)
    if others and config.nav is not None:
        config.nav.append({"More": others})
    return files


def at_the_root(name: str) -> str:
    """Return a page of the repository's root, with links as they are from ``docs/``."""
    text = (REPOSITORY / name).read_text()
    return text.replace("](docs/", "](").replace("](CONTRIBUTING.md", "](contributing.md")


def pages_of(nav: object) -> Iterator[str]:
    """Yield the paths in ``nav``."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for entry in nav.values():
            yield from pages_of(entry)
    elif isinstance(nav, list):
        for entry in nav:
            yield from pages_of(entry)


def command_line() -> Iterator[str]:
    """Yield the lines of the reference of the command line."""
    top = parser()
    yield "# Command line"
    yield ""
    yield (
        f"{top.description} The exit status is 0; 1 if `doctor` found something that will not work; or 2, "
        "with one line on standard error."
    )
    for name, command in commands_of(top):
        yield from ("", f"## {top.prog} {name}", "", sentence(command.description), "")
        yield from ("```text", command.format_usage().strip(), "```", "")
        arguments = [action for action in command._actions if not is_structure(action)]
        if arguments:
            yield from ("| argument | default | meaning |", "|---|---|---|")
            yield from (row(action) for action in arguments)


def commands_of(
    top: argparse.ArgumentParser, prefix: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every command with its parser, commands of commands included."""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield f"{prefix}{name}", command
                yield from commands_of(command, f"{prefix}{name} ")


def is_structure(action: argparse.Action) -> bool:
    """Whether an action is the help option or the choice of a command."""
    return isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))


def row(action: argparse.Action) -> str:
    """Describe one argument."""
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    choices = f" One of {', '.join(f'`{choice}`' for choice in action.choices)}." if action.choices else ""
    hidden = action.default is None or action.default is False or action.default == argparse.SUPPRESS
    default = "required" if action.required else "" if hidden else f"`{action.default}`"
    return f"| {names} | {default} | {sentence(action.help)}{choices} |".replace(
        "%(default)s", str(action.default)
    )


def sentence(text: str | None) -> str:
    """Return a text that begins and ends like a sentence, fit for a table."""
    if not text:
        return ""
    line = " ".join(text.split()).replace("|", "\\|")
    return line[0].upper() + line[1:] + ("" if line.endswith(".") else ".")
