"""What a benchmark run measures, as every rank of it learns it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vllm_efa_ep.bench.contestants.allgather import GlooAllGather, NcclAllGather
from vllm_efa_ep.bench.contestants.alltoall import GlooAllToAll, NcclAllToAll
from vllm_efa_ep.bench.contestants.contestant import Contestant
from vllm_efa_ep.bench.contestants.ours import Ours, OursElsewhere
from vllm_efa_ep.bench.measure import Effort
from vllm_efa_ep.bench.problem import FORMATS, Cell
from vllm_efa_ep.errors import ConfigurationError

OPPONENTS = ("ordinary-tensors", "gloo-agrs", "gloo-a2a", "nccl-agrs", "nccl-a2a", "mpi")
DEVICES = ("cpu", "cuda")
# What these move is in the memory of one device only.
_ONLY_ON = {"gloo-agrs": "cpu", "gloo-a2a": "cpu", "mpi": "cpu", "nccl-agrs": "cuda", "nccl-a2a": "cuda"}


@dataclass(frozen=True)
class Plan:
    """The grid of cells and how each is measured.

    Attributes:
        hidden: Hidden sizes.
        dtypes: Names of ``problem.FORMATS``.
        tokens: Tokens per rank.
        experts: Experts of the layer.
        top_k: Experts per token.
        against: Names of ``OPPONENTS``.
        effort: Rounds and iterations of a cell.
        seed: Of the inputs and routes.
        ranks_per_node: As ``EFA_EP_RANKS_PER_NODE``.
        device: One of ``DEVICES``, where the rows are.

    """

    hidden: tuple[int, ...]
    dtypes: tuple[str, ...]
    tokens: tuple[int, ...]
    experts: int
    top_k: int
    against: tuple[str, ...]
    effort: Effort
    seed: int
    ranks_per_node: int
    device: str = "cpu"

    @property
    def needs_nccl(self) -> bool:
        """Whether the ranks need a process group on NCCL."""
        return any(name.startswith("nccl-") for name in self.against)

    @property
    def needs_mpi(self) -> bool:
        """Whether the ranks must be mpirun's."""
        return "mpi" in self.against

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends of torch.distributed that the contestants need a process group of."""
        return tuple(
            name for name in ("gloo", "nccl") if any(each.startswith(f"{name}-") for each in self.against)
        )

    def check_for_ray(self) -> None:
        """Raise ``ConfigurationError`` for the contestant that ranks on Ray cannot have."""
        if self.needs_mpi:
            raise ConfigurationError(
                "--against mpi cannot be measured with --ray, whose ranks are not mpirun's; leave it out, or "
                "leave out --ray on one machine"
            )

    def check(self) -> None:
        """Raise ``ConfigurationError`` for what no world can measure."""
        for option, given, known in (
            ("--against", self.against, OPPONENTS),
            ("--dtype", self.dtypes, tuple(FORMATS)),
            ("--device", (self.device,), DEVICES),
        ):
            for name in given:
                if name not in known:
                    raise ConfigurationError(f"{option} {name} is unknown; choose from {', '.join(known)}")
        for name in self.against:
            if (only := _ONLY_ON.get(name, self.device)) != self.device:
                raise ConfigurationError(
                    f"--against {name} moves rows in {'GPU' if only == 'cuda' else 'CPU'} memory only, and "
                    f"these are measured with --device {self.device}; leave it out, or give --device {only}"
                )
        if self.effort.fewest < 1 or self.effort.warm_up < 0:
            raise ConfigurationError("there must be at least one iteration, and no fewer than 0 to warm up")

    def check_here(self) -> None:
        """Raise ``ConfigurationError`` for what this host cannot measure."""
        if self.device == "cuda" and not torch.cuda.is_available():
            nccl = " and the contestants on NCCL" if self.needs_nccl else ""
            raise ConfigurationError(
                f"--device cuda needs an NVIDIA GPU that torch {torch.__version__} can use, and this host "
                f"has none; run it where `vllm-efa-ep doctor` says that there is one, or leave out "
                f"--device{nccl}"
            )

    def check_world(self, world: int) -> None:
        """Raise ``ConfigurationError`` for a cell that ``world`` ranks cannot measure."""
        for cell in self.cells(world, self.ranks_per_node or world):
            cell.check()

    def cells(self, world: int, ranks_per_node: int) -> Iterator[Cell]:
        """Yield the cells of a world."""
        for hidden in self.hidden:
            for dtype in self.dtypes:
                for tokens in self.tokens:
                    yield Cell(world, ranks_per_node, hidden, dtype, tokens, self.experts, self.top_k)

    def contestants(self) -> tuple[type[Contestant], ...]:
        """Return who is measured, this package first."""
        classes: dict[str, type[Contestant]] = {
            "ordinary-tensors": OursElsewhere,
            "gloo-agrs": GlooAllGather,
            "gloo-a2a": GlooAllToAll,
            "nccl-agrs": NcclAllGather,
            "nccl-a2a": NcclAllToAll,
        }
        if self.needs_mpi:  # mpi4py starts MPI when it is imported
            from vllm_efa_ep.bench.contestants.mpi_alltoallv import MpiAllToAllv

            classes["mpi"] = MpiAllToAllv
        return (Ours, *(classes[name] for name in self.against))

    def to_json(self) -> str:
        """Return the plan for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Return the plan of ``to_json``."""
        values: dict[str, Any] = json.loads(text)
        values["effort"] = Effort(**values["effort"])
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**(values | lists))
