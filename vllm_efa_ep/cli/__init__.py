"""The command ``vllm-efa-ep``: one module per subcommand."""

import argparse
import sys
from typing import Protocol

from vllm_efa_ep.cli import bench, doctor, metrics, plan, settings, trace
from vllm_efa_ep.errors import EfaEpError


class Command(Protocol):
    """What a subcommand's module offers."""

    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its options."""

    def run(self, options: argparse.Namespace) -> int:
        """Do it; return the exit status. An ``EfaEpError`` is printed in one line, with exit status 2."""


# A module imports torch, ray or a browser's worth of other things only inside run(): --help stays fast.
COMMANDS: tuple[Command, ...] = (settings, plan, doctor, bench, metrics, trace)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(prog="vllm-efa-ep", description="Expert-parallel all-to-all on AWS EFA.")
    subparsers = top.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.NAME, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; return the exit status."""
    options = parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except EfaEpError as error:
        print(f"vllm-efa-ep: {error}", file=sys.stderr)
        return 2
    return status
