"""The command ``vllm-efa-ep``."""

import argparse
import sys

from vllm_efa_ep.config import SETTINGS, settings_markdown
from vllm_efa_ep.errors import EfaEpError


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; return the exit status."""
    parser = argparse.ArgumentParser(prog="vllm-efa-ep", description="Expert-parallel all-to-all on AWS EFA.")
    commands = parser.add_subparsers(dest="command", required=True)

    settings = commands.add_parser("settings", help="list every setting")
    settings.add_argument("--markdown", action="store_true", help="as the text of docs/settings.md")

    plan = commands.add_parser("plan", help="print the memory a rank will take, without allocating it")
    plan.add_argument("--ranks", type=int, required=True, help="ranks of the world")
    plan.add_argument("--ranks-per-node", type=int, default=8, help="ranks that share memory (default 8)")
    plan.add_argument("--tokens", type=int, required=True, help="most tokens per rank and round")
    plan.add_argument("--hidden", type=int, required=True, help="hidden size")
    plan.add_argument("--experts", type=int, required=True, help="experts of the model")
    plan.add_argument("--top-k", type=int, required=True, help="experts per token")
    plan.add_argument("--dtype", default="bfloat16", help="activation dtype on dispatch (default bfloat16)")
    plan.add_argument("--scales", type=int, default=0, help="float32 block scales per token (default 0)")
    plan.add_argument("--channels", type=int, default=1, help="rounds in flight, 2 with dual-batch overlap")

    options = parser.parse_args(arguments)
    try:
        if options.command == "settings":
            sys.stdout.write(settings_markdown() if options.markdown else _settings_text())
        else:
            print(_plan(options))
    except EfaEpError as error:
        print(f"vllm-efa-ep: {error}", file=sys.stderr)
        return 2
    return 0


def _settings_text() -> str:
    return "".join(
        f"{setting.variable} ({setting.kind}, default {setting.default!r}"
        f"{', ' + setting.unit if setting.unit else ''})\n    {setting.meaning}\n"
        for setting in SETTINGS
    )


def _plan(options: argparse.Namespace) -> str:
    # Here and not at the top: listing settings needs no torch.
    import torch

    from vllm_efa_ep.all_to_all import AllToAllConfig
    from vllm_efa_ep.errors import ConfigurationError

    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigurationError(f"--dtype {options.dtype} is no torch dtype; use for example float8_e4m3fn")
    config = AllToAllConfig(
        hidden_size=options.hidden,
        num_experts=options.experts,
        top_k=options.top_k,
        max_tokens_per_rank=options.tokens,
        dtype=dtype,
        scale_columns=options.scales,
        channels=options.channels,
    )
    return str(config.memory_plan(options.ranks, options.ranks_per_node))
