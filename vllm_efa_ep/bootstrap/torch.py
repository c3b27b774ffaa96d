"""Bootstrap from a torch process group."""

import itertools

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from vllm_efa_ep.errors import EfaEpError

# Instances on one store keep apart by their number, which is the same on all ranks because building an
# instance is collective.
_instances = itertools.count()


class TorchBootstrap:
    """Ranks of a torch process group whose backend moves CPU tensors, such as gloo."""

    def __init__(self, group: dist.ProcessGroup, store: Store | None = None) -> None:
        """Use ``group``, and ``store`` (default: the one torch.distributed was initialised with)."""
        self._group = group
        store = store if store is not None else dist.distributed_c10d._get_default_store()
        self._store = PrefixStore(f"vllm_efa_ep/{next(_instances)}", store)

    @property
    def rank(self) -> int:
        """Rank in the group."""
        return dist.get_rank(self._group)

    @property
    def world_size(self) -> int:
        """Size of the group."""
        return dist.get_world_size(self._group)

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Gather over the group."""
        gathered: list[bytes] = [b""] * self.world_size
        dist.all_gather_object(gathered, payload, self._group)
        return gathered

    def publish(self, key: str, value: str) -> None:
        """Set a key of the store."""
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise EfaEpError(f"the store of torch.distributed does not answer: {error}") from error

    def lookup(self, key: str) -> str | None:
        """Get a key of the store if it is set."""
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError as error:
            raise EfaEpError(f"the store of torch.distributed does not answer: {error}") from error
