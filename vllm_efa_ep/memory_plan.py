"""How much memory an ``AllToAll`` takes, known before anything is allocated."""

from dataclasses import dataclass

from vllm_efa_ep import _core


@dataclass(frozen=True)
class MemoryPlan:
    """The arena of one rank, in bytes.

    Attributes:
        sections: Bytes of each section of one channel; ``csrc/protocol/layout.h`` says what they hold.
        channels: Number of channels, each with its own sections.
        rounding: Bytes that round the arena up to whole 2 MiB pages.
        total: All of it: what is allocated, and registered with every NIC.

    """

    sections: dict[str, int]
    channels: int
    rounding: int
    total: int

    @classmethod
    def of(cls, layout: _core.Layout) -> "MemoryPlan":
        """Return the plan of a layout."""
        total = _core.Arena.allocated_bytes(layout.total_bytes)
        return cls(layout.sections(), layout.channels, total - layout.total_bytes, total)

    def __str__(self) -> str:
        """Return a table for people."""
        rows = [*self.sections.items(), ("one channel", sum(self.sections.values()))]
        lines = [f"{name:<18} {size:>16,} B  {size / 2**20:10.2f} MiB" for name, size in rows]
        lines.append(f"{'channels':<18} {self.channels:>16,}")
        lines.append(f"{'page rounding':<18} {self.rounding:>16,} B")
        lines.append(f"{'total':<18} {self.total:>16,} B  {self.total / 2**20:10.2f} MiB per rank")
        return "\n".join(lines)
