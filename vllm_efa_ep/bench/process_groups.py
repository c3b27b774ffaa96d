"""Process groups of torch for ranks that another launcher than torchrun has started."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from vllm_efa_ep.bootstrap import Bootstrap


@contextmanager
def process_groups(
    bootstrap: Bootstrap, backends: tuple[str, ...]
) -> Iterator[Mapping[str, dist.ProcessGroup]]:
    """Collective: join all ranks in a process group per backend, for the time of a ``with``.

    Args:
        bootstrap: Tells the ranks where they meet, which is on the host of rank 0.
        backends: Of torch.distributed, such as ``gloo``; none: no group, and nothing happens.

    """
    if not backends:
        yield {}
        return
    store = None
    if bootstrap.rank == 0:
        store = TCPStore(bootstrap.address, 0, is_master=True, wait_for_workers=False)
    place = f"{bootstrap.address} {store.port}" if store is not None else ""
    host, port = bootstrap.all_gather(place.encode())[0].decode().split()
    if store is None:
        store = TCPStore(host, int(port), is_master=False)
    dist.init_process_group(backends[0], store=store, rank=bootstrap.rank, world_size=bootstrap.world_size)
    try:
        groups = {backends[0]: cast(dist.ProcessGroup, dist.group.WORLD)}
        groups |= {backend: dist.new_group(backend=backend) for backend in backends[1:]}
        yield groups
        bootstrap.all_gather(b"")  # rank 0, and the store with it, stays until all others are done
    finally:
        dist.destroy_process_group()
