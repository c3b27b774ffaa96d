"""``vllm-efa-ep doctor``: is this machine, or this cluster, ready?"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_efa_ep.errors import ConfigurationError

if TYPE_CHECKING:
    from vllm_efa_ep.doctor.examination import Report

NAME = "doctor"
HELP = "check this machine or cluster before the first run, and say how to mend it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--require-efa", action="store_true", help="fail where EFA would not be used")
    parser.add_argument("--ray", action="store_true", help="examine all nodes of the Ray cluster")
    parser.add_argument("--nodes", type=int, help="examine this many nodes, on each of which this runs")
    parser.add_argument("--node", type=int, help="which of them this is, from 0")
    parser.add_argument("--meet", metavar="HOST:PORT", help="address of node 0 and a free port there")
    parser.add_argument(
        "--token-file", type=Path, help="file with a random secret, the same on all nodes that --meet"
    )
    parser.add_argument(
        "--timeout", type=float, default=10.0, help="seconds a pair of nodes may take (default 10)"
    )
    parser.add_argument("--markdown", action="store_true", help="print the text of docs/doctor.md and end")


def run(options: argparse.Namespace) -> int:
    """Examine and print; on several nodes, node 0 prints.

    Returns:
        0 if nothing failed, else 1.

    Raises:
        ConfigurationError: The options do not fit each other, or the nodes did not meet.

    """
    from vllm_efa_ep.doctor.check import Status
    from vllm_efa_ep.doctor.reference import markdown

    if options.markdown:
        sys.stdout.write(markdown())
        return 0
    from rich.console import Console

    _check(options)
    console = Console(stderr=True)
    with console.status("starting") as status:

        def begin(check: str) -> None:
            status.update(f"checking {check}")
            if not console.is_terminal:  # the log of a pod or a job, where the line above does not show
                console.print(f"checking {check}", highlight=False, soft_wrap=True)

        report = _examine(options, begin)
    if not options.node:
        _print(report, options.json)
    return int(report.status is Status.FAILED)


def _check(options: argparse.Namespace) -> None:
    options_of_nodes = ("nodes", "node", "meet", "token_file")
    given = [name for name in options_of_nodes if getattr(options, name) is not None]
    if options.ray and given:
        raise ConfigurationError(f"--ray finds the nodes itself; leave out --{given[0].replace('_', '-')}")
    if given and len(given) < len(options_of_nodes):
        raise ConfigurationError(
            "--nodes, --node, --meet and --token-file belong together; give all four, the file with `openssl "
            "rand -hex 32` in it"
        )
    if given and not 0 <= options.node < options.nodes:
        raise ConfigurationError(f"--node {options.node} is not one of 0 to {options.nodes - 1}")
    if options.timeout <= 0:
        raise ConfigurationError(f"--timeout {options.timeout:g} is too short; give seconds above 0")


def _examine(options: argparse.Namespace, begin: Callable[[str], None]) -> "Report":
    if options.ray:
        try:
            from vllm_efa_ep.doctor.cluster.on_ray import examine_ray
        except ImportError as error:
            raise ConfigurationError(
                f"--ray needs Ray ({error}); `pip install 'vllm-efa-ep[ray]'`, or give --nodes, --node, "
                "--meet and --token-file"
            ) from error
        begin("all nodes of the Ray cluster")
        return examine_ray(options.timeout, options.require_efa)
    from vllm_efa_ep.doctor.examination import examine_cluster, examine_node
    from vllm_efa_ep.doctor.system import this_system

    if options.nodes is None:
        return examine_node(this_system(), options.require_efa, begin)
    from vllm_efa_ep.doctor.cluster.meeting import Meeting, run_of

    host, port = _address(options.meet)
    begin(f"that all {options.nodes} nodes meet at {options.meet}")
    with Meeting(host, port, options.node, options.nodes, run_of(options.token_file)) as meeting:
        return examine_cluster(this_system(), meeting.bootstrap, options.timeout, options.require_efa, begin)


def _address(meet: str) -> tuple[str, int]:
    host, _, port = meet.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigurationError(f"--meet {meet} is no HOST:PORT; give for example --meet 10.0.0.1:29600")
    return host.strip("[]"), int(port)


def _print(report: "Report", as_json: bool) -> None:
    if as_json:
        from vllm_efa_ep.doctor.next_steps import next_steps

        print(json.dumps({**report.to_json(), "next": next_steps(report)}, indent=2))
        return
    from rich.console import Console

    from vllm_efa_ep.doctor.rendering import render

    render(report, Console())
