"""The interface of everything that is timed."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist

from vllm_efa_ep.bench.problem import Problem
from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import ConfigurationError

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass
class Scratch:
    """A cell's buffers by name, shared by its contestants, which never run at the same time.

    Attributes:
        device: Where they are.

    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def rows(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Return buffer ``name`` as ``[rows, columns]``, grown if it is too small."""
        count = rows * columns * dtype.itemsize
        if name not in self._buffers or self._buffers[name].numel() < count:
            self._buffers[name] = torch.empty(count, dtype=torch.uint8, device=self.device)
        return self._buffers[name][:count].view(dtype).view(rows, columns)

    def poison(self) -> None:
        """Overwrite every buffer, so that no contestant passes a check with another one's results."""
        for buffer in self._buffers.values():
            buffer.fill_(0xFF)


@dataclass
class Workplace:
    """What a contestant may use.

    Attributes:
        bootstrap: Connects the ranks; what this package starts from.
        settings: Settings for this package.
        groups: Process groups by backend, for the contestants on gloo and NCCL; none where the launcher
            made none.
        mpi_world: MPI communicator, for the contestant on MPI; None where the launcher was not mpirun.
        bare_writes_library: The built ``benchmarks/bare_writes.cpp``, for that floor.
        scratch: Shared buffers.

    """

    bootstrap: Bootstrap
    settings: Settings
    groups: Mapping[str, dist.ProcessGroup] = field(default_factory=dict)
    mpi_world: "MPI.Intracomm | None" = None
    bare_writes_library: str = ""
    scratch: Scratch = field(default_factory=Scratch)

    def group(self, backend: str) -> dist.ProcessGroup:
        """Return the process group of a backend of torch.distributed.

        Raises:
            ConfigurationError: There is none.

        """
        if backend not in self.groups:
            raise ConfigurationError(
                f"the contestants on {backend} need a torch process group, which this launcher does not "
                "make; leave --against away, or launch with torchrun"
            )
        return self.groups[backend]

    @property
    def mpi(self) -> "MPI.Intracomm":
        """The communicator of MPI.

        Raises:
            ConfigurationError: There is none.

        """
        if self.mpi_world is None:
            raise ConfigurationError(
                "the contestant on MPI needs ranks that mpirun started; leave the launch to "
                "`vllm-efa-ep bench`, without torchrun and --ray"
            )
        return self.mpi_world


class Contestant(ABC):
    """One way to do a round; built per cell with its buffers allocated, and closed after it.

    Attributes:
        name: In results.
        steps: The methods that make up a round, in order, each timed by itself; the first word of a name is
            the operation, ``dispatch`` or ``combine``, that it belongs to.

    """

    name: ClassVar[str]
    steps: ClassVar[tuple[str, ...]] = ("dispatch", "combine")

    def __init__(self, problem: Problem, workplace: Workplace) -> None:
        """Allocate and connect whatever the timed steps need."""
        self.problem = problem
        self.workplace = workplace

    @abstractmethod
    def check(self) -> None:
        """Raise ``WrongResultError`` unless the last round's results are the oracle's."""

    def counters(self) -> dict[str, float]:
        """Return totals since the start that are worth reporting per round."""
        return {}

    def environment(self) -> dict[str, Any]:
        """Return what the numbers depend on that only this contestant knows."""
        return {}

    def close(self) -> None:  # noqa: B027 - most contestants hold nothing but memory
        """Release what the garbage collector does not."""
