"""``vllm-efa-ep trace``: one timeline of what all ranks did."""

import argparse
import json
from pathlib import Path

from vllm_efa_ep.errors import ConfigurationError

NAME = "trace"
HELP = "make one timeline of the traces that ranks wrote into EFA_EP_TRACE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True)
    merging = actions.add_parser("merge", help="merge the ranks' files; open the result in ui.perfetto.dev")
    merging.add_argument("directory", type=Path, help="what EFA_EP_TRACE was; the files of all hosts")
    merging.add_argument("-o", "--output", type=Path, default=Path("trace.json"))


def run(options: argparse.Namespace) -> int:
    """Merge, and say how well the clocks of the hosts agree.

    Raises:
        ConfigurationError: There is nothing to merge, or the output cannot be written.

    """
    from vllm_efa_ep.trace.merge import merge

    timeline = merge(options.directory)
    try:
        options.output.write_text(json.dumps(timeline))
    except OSError as error:
        raise ConfigurationError(f"cannot write the timeline: {error}; name another file with -o") from error
    other = timeline["otherData"]
    for rank, dropped in other["dropped_spans"].items():
        if dropped:
            print(f"rank {rank}: {dropped} older spans were replaced; raise EFA_EP_TRACE_SPANS to keep them")
    for host, error_us in other["clock_errors_us"].items():
        offset_us = other["clock_offsets_us"][host]
        print(f"host of rank {host}: clock {offset_us:+.1f} us, known within {error_us:.1f} us")
    print(f"written: {options.output} ({len(timeline['traceEvents'])} events)")
    return 0
