"""Translates PTX, as `nvcc -ptx` writes it, into C++ that runs on the fibers of tests/simt/engine.

Exit status 1, with file and line, for what it does not know: nothing is skipped.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from tests.simt.ptx.parser import PtxError, parse
from tests.simt.ptx.translator import translate


def main() -> int:
    """Command line: see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ptx", type=pathlib.Path)
    parser.add_argument("cpp", type=pathlib.Path)
    arguments = parser.parse_args()
    try:
        cpp = translate(parse(str(arguments.ptx), arguments.ptx.read_text()))
    except PtxError as error:
        print(error, file=sys.stderr)
        return 1
    arguments.cpp.write_text(cpp)
    return 0


if __name__ == "__main__":
    sys.exit(main())
