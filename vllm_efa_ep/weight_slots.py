"""Where the weights of a rank's experts lie: tensors of ``[slots, ...]``, each slot one run of bytes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.experts_plan import Move
from vllm_efa_ep.nixl_agent import Region


@dataclass(frozen=True)
class WeightSlots:
    """A tensor of ``[slots, ...]``, as other ranks have to know it.

    Attributes:
        address: Of the first slot.
        slots: Their number.
        slot_bytes: Bytes of one slot.
        step_bytes: From one slot to the next.
        shape: Of one slot.
        stride: Of one slot; both ends need the same, since bytes are copied.
        dtype: Such as ``torch.bfloat16``.
        kind: ``DRAM`` or ``VRAM``.
        device: The CUDA device, 0 on the CPU.

    """

    address: int
    slots: int
    slot_bytes: int
    step_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    kind: str
    device: int

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "WeightSlots":
        """Describe a tensor.

        Raises:
            ConfigurationError: It has no slots, or a slot is not one run of bytes.

        """
        if tensor.ndim == 0:
            raise ConfigurationError(f"{name} is a single number; weights of experts have shape [slots, ...]")
        shape, stride = tuple(tensor.shape[1:]), tuple(tensor.stride()[1:])
        run = 1
        for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
            if step != run:
                raise ConfigurationError(
                    f"{name} of shape {list(tensor.shape)} and strides {list(tensor.stride())} has gaps "
                    "inside a slot; pass a contiguous tensor"
                )
            run *= size
        slot_bytes = prod(shape) * tensor.itemsize
        step_bytes = tensor.stride(0) * tensor.itemsize
        if tensor.shape[0] > 1 and step_bytes < slot_bytes:
            raise ConfigurationError(
                f"{name} has slots that overlap (strides {list(tensor.stride())}); pass a contiguous tensor"
            )
        return cls(
            tensor.data_ptr(),
            tensor.shape[0],
            slot_bytes,
            step_bytes,
            shape,
            stride,
            str(tensor.dtype),
            "VRAM" if tensor.is_cuda else "DRAM",
            tensor.device.index or 0,
        )

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "WeightSlots":
        """Return what ``to_json`` described."""
        return cls(**{**fields, "shape": tuple(fields["shape"]), "stride": tuple(fields["stride"])})

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON can carry them."""
        return asdict(self)

    @property
    def region(self) -> Region:
        """All slots."""
        size = (self.slots - 1) * self.step_bytes + self.slot_bytes if self.slots > 0 else 0
        return Region(self.address, size, self.device)

    def slot(self, number: int) -> Region:
        """One slot."""
        return Region(self.address + number * self.step_bytes, self.slot_bytes, self.device)

    def slot_at(self, address: int) -> int:
        """Return the number of the slot that begins at ``address``.

        Raises:
            ConfigurationError: None does.

        """
        number, rest = divmod(address - self.address, self.step_bytes or 1)
        if rest != 0 or not 0 <= number < self.slots:
            raise ConfigurationError(f"no slot of the tensor at {self.address:#x} begins at {address:#x}")
        return number

    def mismatch(self, other: "WeightSlots") -> str:
        """Say in which way ``other`` cannot be copied here slot by slot, empty if it can."""
        for what in ("shape", "dtype", "stride", "kind"):
            own, others = getattr(self, what), getattr(other, what)
            if own != others:
                return f"{what} {others} per slot, but {own} is wanted; both must be equal"
        return ""


def check_move(
    offered: Mapping[str, WeightSlots], layer: str, move: Move, targets: Mapping[str, WeightSlots]
) -> None:
    """Refuse a move whose ends do not fit each other.

    Args:
        offered: What the source has, by the names of the weights.
        layer: The layer, for the message.
        move: Which expert, from where to where.
        targets: What this rank wants to fill, by the same names.

    Raises:
        ConfigurationError: Names, shapes, types or slots differ; the message says which.

    """
    source = f"rank {move.source}"
    if offered.keys() != targets.keys() or not targets:
        raise ConfigurationError(
            f"expert {move.expert} of {layer}: {source} offers {sorted(offered)}, but {sorted(targets)} are "
            "wanted; both must have the same names, at least one"
        )
    for name, target in targets.items():
        problem = target.mismatch(offered[name])
        if problem:
            raise ConfigurationError(f"expert {move.expert} of {layer}: {name} at {source} has {problem}")
        for slot, end, where in ((move.source_slot, offered[name], source), (move.slot, target, "this rank")):
            if not 0 <= slot < end.slots:
                raise ConfigurationError(
                    f"expert {move.expert} of {layer}: {name} has no slot {slot} at {where}; it has "
                    f"{end.slots}"
                )
