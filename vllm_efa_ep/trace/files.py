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


def create_directory(directory: str) -> Path:
    """Return the directory of the traces; create it if it is not there.

    Raises:
        ConfigurationError: That is not possible.

    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"EFA_EP_TRACE is {directory!r}, which cannot be created ({error}); name a directory that this "
            "rank may write to"
        ) from error
    return Path(directory)


def write_trace(
    directory: str,
    world: World,
    generation: int,
    least_delays_ns: Sequence[int],
    device: Halves,
    proxy: _core.Proxy | None,
) -> None:
    """Write ``rank<r>.<process>.<number>.json``; a process may have several instances and generations.

    Raises:
        OSError: The file cannot be written.

    """
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
    complete = path.with_suffix(".tmp")
    complete.write_text(json.dumps(content))
    complete.replace(path)  # a rank that is killed meanwhile leaves no part of a trace


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
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"{path} cannot be read ({error}); remove it, or copy it again"
            ) from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ConfigurationError(f"{path} is not a trace of this version ({SCHEMA})")
        yield content
