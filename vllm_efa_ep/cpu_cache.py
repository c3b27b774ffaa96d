"""A core's own cache, as the kernel describes it in sysfs."""

from pathlib import Path

_LEVEL = 2  # the last one that cores do not share
_UNKNOWN = 2**63  # bytes: more than any rows have


def own_cache_bytes(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the size of CPU 0's second-level cache; if the kernel does not tell, more than any rows have.

    C's ``sysconf`` is no help: in a virtual machine it may tell of the whole host's caches.
    """
    for cache in caches.glob("index*"):
        try:
            if int((cache / "level").read_text()) == _LEVEL:
                return int((cache / "size").read_text().strip().removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return _UNKNOWN
