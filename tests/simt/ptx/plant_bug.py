"""Plants a bug in a PTX file: `plant_bug.py IN OUT REGEX REPLACEMENT`.

Exit status 1 if there is nothing to replace.
"""

from __future__ import annotations

import pathlib
import re
import sys


def main() -> int:
    """Command line: see above."""
    source, target, pattern, replacement = sys.argv[1:]
    text, count = re.subn(pattern, replacement, pathlib.Path(source).read_text())
    if count == 0:
        print(f"{source}: nothing is like {pattern}", file=sys.stderr)
        return 1
    pathlib.Path(target).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
