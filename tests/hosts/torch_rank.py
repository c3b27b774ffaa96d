"""One rank of a torch.distributed world on a host: ``torch_rank.py BODY RANK SIZE STORE_ADDRESS PORT``.

Prints one JSON line per event and one with the result of the body.
"""

import json
import sys

import torch.distributed as dist
from bodies import BODIES

from vllm_efa_ep.bootstrap.torch import TorchBootstrap


def main() -> None:
    """Join the world and run the body."""
    body, rank, size, address, port = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4], int(sys.argv[5])
    store = dist.TCPStore(address, port, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    result = BODIES[body](TorchBootstrap(dist.group.WORLD, store), tell)
    print(json.dumps({"result": result}), flush=True)


def tell(event: str) -> None:
    """Let the test know."""
    print(json.dumps({"event": event}), flush=True)


if __name__ == "__main__":
    main()
