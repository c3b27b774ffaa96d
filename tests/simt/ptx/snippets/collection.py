"""All snippets.

`python -m tests.simt.ptx.snippets.collection DIRECTORY` writes snippets.ptx for ptx2cpp, and snippets.inc,
the kernels' names, for the driver.
"""

from __future__ import annotations

import argparse
import pathlib

from tests.simt.ptx.snippets.arithmetic import ARITHMETIC
from tests.simt.ptx.snippets.threads import MEMORY, THREADS_TOGETHER

SNIPPETS = {f"snippet_{i}": snippet for i, snippet in enumerate([*ARITHMETIC, *THREADS_TOGETHER, *MEMORY])}
HEADER = ".version 9.0\n.target sm_90a\n.address_size 64\n"


def main() -> None:
    """Command line: see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=pathlib.Path)
    directory = parser.parse_args().directory
    kernels = [snippet.kernel(name) for name, snippet in SNIPPETS.items()]
    (directory / "snippets.ptx").write_text(HEADER + "\n".join(kernels))
    (directory / "snippets.inc").write_text("".join(f"SNIPPET({name})\n" for name in SNIPPETS))


if __name__ == "__main__":
    main()
