"""Lets vLLM's own parser read command lines, with the plugin loaded as vLLM would.

For each line of standard input, a JSON list of the words after ``vllm``, it prints a line: what was parsed of
``WANTED`` as a JSON object, or the text of the refusal as a JSON string.
"""

import contextlib
import io
import json
import sys
from typing import Any

from vllm.entrypoints.cli import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

WANTED = (
    "all2all_backend",
    "data_parallel_backend",
    "data_parallel_size",
    "data_parallel_size_local",
    "data_parallel_start_rank",
    "enable_expert_parallel",
    "headless",
    "max_num_batched_tokens",
    "max_num_seqs",
)


def parse(parser: FlexibleArgumentParser, words: list[str]) -> dict[str, Any] | str:
    """Return the values of ``WANTED``, or why the line was refused."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options = parser.parse_args(words)
    except SystemExit:
        return errors.getvalue()
    return {name: getattr(options, name) for name in WANTED}


def main() -> None:
    """Parse every line with one parser."""
    parser = FlexibleArgumentParser(prog="vllm")
    subparsers = parser.add_subparsers(dest="subparser", required=True)
    for command in serve.cmd_init():
        command.subparser_init(subparsers)
    for line in sys.stdin:
        print(json.dumps(parse(parser, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
