"""The interface of everything that is timed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.distributed as dist
from mpi4py import MPI

from benchmarks.problem import Problem
from vllm_efa_ep.config import Settings


@dataclass
class Scratch:
    """A cell's buffers by name, shared by its contestants, which never run at the same time."""

    _buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def rows(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Return buffer ``name`` as ``[rows, columns]``, grown if it is too small."""
        count = rows * columns * dtype.itemsize
        if name not in self._buffers or self._buffers[name].numel() < count:
            self._buffers[name] = torch.empty(count, dtype=torch.uint8)
        return self._buffers[name][:count].view(dtype).view(rows, columns)

    def poison(self) -> None:
        """Overwrite every buffer, so that no contestant passes a check with another one's results."""
        for buffer in self._buffers.values():
            buffer.fill_(0xFF)


@dataclass
class Workplace:
    """What a contestant may use.

    Attributes:
        rank: This rank.
        world: All ranks.
        group: Gloo process group over the loopback interface.
        mpi: MPI communicator over shared memory or over TCP, as the scene asks.
        settings: Settings for this package, as the scene asks.
        bare_writes_library: The built ``bare_writes.cpp``.
        scratch: Shared buffers.

    """

    rank: int
    world: int
    group: dist.ProcessGroup
    mpi: MPI.Intracomm
    settings: Settings
    bare_writes_library: str
    scratch: Scratch


class Contestant(ABC):
    """One way to do a round; built per cell with its buffers allocated, and closed after it."""

    name: ClassVar[str]

    def __init__(self, problem: Problem, workplace: Workplace) -> None:
        """Allocate and connect whatever the timed halves need."""
        self.problem = problem
        self.workplace = workplace

    @abstractmethod
    def dispatch(self) -> None:
        """Bring the tokens of all ranks to the ranks that own their experts."""

    @abstractmethod
    def combine(self) -> None:
        """Bring the expert outputs back and sum them into ``problem.out``."""

    @abstractmethod
    def check(self) -> None:
        """Raise ``WrongResultError`` unless the last round's results are the oracle's."""

    def close(self) -> None:  # noqa: B027 - most contestants hold nothing but memory
        """Release what the garbage collector does not."""
