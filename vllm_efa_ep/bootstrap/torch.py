"""Bootstrap from a torch process group."""

import json

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from vllm_efa_ep.bootstrap.run import Run
from vllm_efa_ep.bootstrap.store import StoreBootstrap
from vllm_efa_ep.errors import EfaEpError


class TorchBootstrap(StoreBootstrap):
    """Ranks of a torch process group whose backend moves CPU tensors, such as gloo.

    The group serves the start, and hands the run's token to its members; what must work while ranks are dead
    goes over the store, which others may reach.
    """

    def __init__(self, group: dist.ProcessGroup, store: Store | None = None) -> None:
        """Collective: use ``group``, and ``store`` (default: the one of ``torch.distributed``)."""
        self._group = group
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        # Of its own: other groups and other instances may use the same store.
        own = Run.new()
        told = self._gather_in_group(json.dumps([own.name, own.token.hex()]).encode(), world_size)
        name, token = json.loads(told[0])
        store = store if store is not None else dist.distributed_c10d._get_default_store()
        super().__init__(store, Run(name, bytes.fromhex(token)), rank, world_size)

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Gather over the group, within the group's timeout."""
        return self._gather_in_group(payload, self.world_size)

    def _gather_in_group(self, payload: bytes, world_size: int) -> list[bytes]:
        gathered: list[bytes] = [b""] * world_size
        try:
            dist.all_gather_object(gathered, payload, self._group)
        except RuntimeError as error:
            raise EfaEpError(f"a rank left while all of them were starting: {error}") from error
        return gathered
