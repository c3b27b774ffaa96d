"""How much memory an ``AllToAll`` takes, known before anything is allocated."""

from dataclasses import dataclass

from vllm_efa_ep import _core


@dataclass(frozen=True)
class MemoryPlan:
    """The arena of one rank, and the buffers that its received rows lie in, in bytes.

    Attributes:
        sections: Bytes of each section of one channel of the arena; ``csrc/protocol/layout.h`` says what they
            hold.
        channels: Number of channels, each with its own sections and its own buffer.
        rounding: Bytes that round the arena up to whole 2 MiB pages.
        arena: All sections and the rounding: what is shared inside the node, and registered with every NIC.
        received_rows: The tensors of ``Dispatched`` of all channels, beside the arena. In the per_token
            layout on CPUs that is the most they grow to: they begin empty.

    """

    sections: dict[str, int]
    channels: int
    rounding: int
    arena: int
    received_rows: int

    @classmethod
    def of(cls, layout: _core.Layout, received_rows: int) -> "MemoryPlan":
        """Return the plan of an arena's layout, with the bytes of one channel's received rows."""
        arena = _core.Arena.allocated_bytes(layout.total_bytes)
        rounding = arena - layout.total_bytes
        return cls(layout.sections(), layout.channels, rounding, arena, layout.channels * received_rows)

    @property
    def total(self) -> int:
        """Arena and received rows."""
        return self.arena + self.received_rows

    def __str__(self) -> str:
        """Return a table for people."""
        rows = [*self.sections.items(), ("one channel", sum(self.sections.values()))]
        lines = [f"{name:<18} {size:>16,} B  {size / 2**20:10.2f} MiB" for name, size in rows]
        lines.append(f"{'channels':<18} {self.channels:>16,}")
        lines.append(f"{'page rounding':<18} {self.rounding:>16,} B")
        sums = [("arena", self.arena), ("received rows", self.received_rows), ("total", self.total)]
        lines += [f"{name:<18} {size:>16,} B  {size / 2**20:10.2f} MiB" for name, size in sums]
        return "\n".join(lines) + " per rank"
