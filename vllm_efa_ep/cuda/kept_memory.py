"""Memory that a rank keeps, at the same addresses, when it loses its world and builds the next one.

A captured CUDA graph has addresses in it: of the workspace, where kernels find everything else, of the words
that they share with the host, and, if the caller works in place, of parts of the arena. All of them stay, and
are filled anew for each generation, so nobody captures again. The arena is new memory all the same, with new
keys, mapped at the old addresses: what a rank of an older generation still writes, nobody reads.
"""

import weakref
from contextlib import ExitStack

from vllm_efa_ep.cuda.arena import AddressRange, DeviceArena
from vllm_efa_ep.cuda.driver import Gpu
from vllm_efa_ep.cuda.memory import DeviceMemory, PinnedMemory
from vllm_efa_ep.errors import ConfigurationError


class KeptMemory:
    """Of one rank on one GPU. Its sizes follow from the layout, which no generation changes."""

    def __init__(self) -> None:
        """Allocate nothing yet."""
        self._ordinal: int | None = None
        self._host: PinnedMemory | None = None
        self._workspace: DeviceMemory | None = None
        self._addresses: AddressRange | None = None
        self._arena: weakref.ref[DeviceArena] | None = None
        self._cleanup = ExitStack()
        self._release = weakref.finalize(self, self._cleanup.close)

    def stay_on(self, ordinal: int) -> None:
        """Remember the GPU of the first generation.

        Raises:
            ConfigurationError: This is another one.

        """
        if self._ordinal is None:
            self._ordinal = ordinal
        if ordinal != self._ordinal:
            raise ConfigurationError(
                f"this rank's memory is on GPU {self._ordinal}, but the calling thread's current GPU is "
                f"{ordinal}; build the next world inside `with torch.cuda.device({self._ordinal}):`"
            )

    def host(self, size: int) -> PinnedMemory:
        """Return pinned memory, all zeros: the same one at each call."""
        if self._host is None:
            self._host = PinnedMemory(size)
            self._cleanup.callback(self._host.close)
        else:
            _check_size("pinned memory", self._host.bytes, size)
            self._host.clear()
        return self._host

    def workspace(self, size: int) -> DeviceMemory:
        """Return memory for the kernels' state, all zeros: the same one at each call."""
        if self._workspace is None:
            self._workspace = DeviceMemory(size)
            self._cleanup.callback(self._workspace.close)
        else:
            _check_size("workspace", self._workspace.bytes, size)
            self._workspace.clear()
        return self._workspace

    def arena(self, gpu: Gpu, size: int, fabric: bool) -> DeviceArena:
        """Return a new arena where the last one was. Tensors of that one show the new one from now on."""
        last = self._arena() if self._arena is not None else None
        if last is not None:
            last.close()
        arena = DeviceArena.create(gpu, size, self._addresses, fabric)
        self._addresses = arena.addresses
        self._arena = weakref.ref(arena)
        return arena

    def close(self) -> None:
        """Free it; no kernel runs any more. An arena is freed when its last tensor is gone."""
        self._addresses = None
        self._release()


def _check_size(what: str, there: int, wanted: int) -> None:
    if there != wanted:
        raise ConfigurationError(
            f"the {what} of this rank has {there} bytes, but the new world needs {wanted}; restart all ranks "
            "with equal settings"
        )
