"""The file that a rank leaves of one generation of its world."""

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_efa_ep import _core
from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.rank_memory import Halves
from vllm_efa_ep.world import World

SCHEMA = "vllm-efa-ep trace 1"
_numbers = itertools.count()


def write_trace(
    directory: str,
    world: World,
    generation: int,
    least_delays_ns: Sequence[int],
    device: Halves,
    proxy: _core.Proxy | None,
) -> None:
    """Write ``rank<r>.<process>.<number>.json``; a process may have several instances and generations."""
    content = {
        "schema": SCHEMA,
        "rank": world.rank,
        "host": world.host_of[world.rank],
        "generation": generation,
        "least_delays_ns": list(least_delays_ns),
        "dropped": device.dropped_spans() + (proxy.dropped_spans() if proxy is not None else 0),
        "spans": [*device.trace(), *(proxy.trace() if proxy is not None else ())],
    }
    path = Path(directory) / f"rank{world.rank}.{os.getpid()}.{next(_numbers)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def read(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the files of a directory.

    Raises:
        ConfigurationError: There are none, or one is something else.

    """
    paths = sorted(directory.glob("rank*.json"))
    if not paths:
        raise ConfigurationError(
            f"{directory} has no rank*.json; start the ranks with EFA_EP_TRACE={directory}, and let them end "
            "by themselves: a trace is written when they close"
        )
    for path in paths:
        content: dict[str, Any] = json.loads(path.read_text())
        if content.get("schema") != SCHEMA:
            raise ConfigurationError(f"{path} is not a trace of this version ({SCHEMA})")
        yield content
