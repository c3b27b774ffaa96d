"""Bootstrap from a torch process group."""

import json
import logging
import secrets
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from vllm_efa_ep.bootstrap.run import TOKEN_BYTES, Run, new_token, read_secret
from vllm_efa_ep.bootstrap.sealed import Seal
from vllm_efa_ep.bootstrap.store import StoreBootstrap
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import ConfigurationError, EfaEpError
from vllm_efa_ep.messages import read_json

logger = logging.getLogger(__name__)

_NONCE_BYTES = 16
_MOST_BYTES = 1 << 26


class TorchBootstrap(StoreBootstrap):
    """Ranks of a torch process group whose backend moves CPU tensors, such as gloo.

    The group serves the start; what must work while ranks are dead goes over the store. Strangers reach both:
    torch takes whoever comes while it makes the group, and whoever connects to the store. So what is told is
    sealed with the run's token. It follows from the secret in ``EFA_EP_TOKEN_FILE``, which a stranger in the
    group does not have; without one the first rank makes the token, and the group hands it to its members.
    """

    def __init__(
        self, group: dist.ProcessGroup, store: Store | None = None, settings: Settings | None = None
    ) -> None:
        """Collective.

        Args:
            group: The ranks.
            store: Default: the one of ``torch.distributed``.
            settings: Default: those of the environment.

        Raises:
            ConfigurationError: Some ranks have a secret, others have none, or it cannot be read.
            MembershipError: A rank of the group has another secret.
            EfaEpError: A rank left, or did not come within the group's timeout.

        """
        self._group = group
        self._gatherings = 0
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        token_file = (settings or Settings.from_environment()).token_file
        secret = read_secret(Path(token_file), "EFA_EP_TOKEN_FILE") if token_file else None
        run = self._meet(world_size, secret)
        super().__init__(
            store if store is not None else dist.distributed_c10d._get_default_store(), run, rank, world_size
        )
        self._seal = Seal(run)
        self.all_gather(b"")  # who cannot seal is no member, whatever comes next

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Gather over the group, within the group's timeout.

        Raises:
            MembershipError: A rank of the group is not a member of the run.
            EfaEpError: A rank left, or did not come within the group's timeout.

        """
        self._gatherings += 1
        sealed = self._gather_in_group(self._seal.close(self._name_of(self.rank), payload), self.world_size)
        return [self._seal.open(self._name_of(rank), each) for rank, each in enumerate(sealed)]

    def _name_of(self, rank: int) -> str:
        return f"what rank {rank} told in gathering {self._gatherings} of the process group"

    def _meet(self, world_size: int, secret: bytes | None) -> Run:
        """Agree on a run of its own: other groups and other instances may use the same store."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        own = json.dumps([nonce.hex(), "" if secret else new_token().hex()])
        told = [
            read_json(each, f"rank {rank}", _greeting)
            for rank, each in enumerate(self._gather_in_group(own.encode(), world_size))
        ]
        without = [rank for rank, (_, token) in enumerate(told) if token]
        if secret is None and len(without) == world_size:
            if dist.get_rank(self._group) == 0 and world_size > 1:
                _warn_of_no_secret()
            nonce, token = told[0]
            return Run(nonce.hex(), token)
        if secret is None or without:
            raise ConfigurationError(
                f"ranks {without} of the process group have no EFA_EP_TOKEN_FILE, and others have one; set "
                "it on all hosts, to files with the same secret"
            )
        return Run.of_secret(secret, [nonce for nonce, _ in told])

    def _gather_in_group(self, payload: bytes, world_size: int) -> list[bytes]:
        """Gather bytes as bytes: torch's own way to gather objects runs the code that they name."""
        try:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
            dist.all_gather(sizes, torch.tensor([len(payload)]), self._group)
            longest = max(int(size) for size in sizes)
            if not len(payload) <= longest <= _MOST_BYTES or min(map(int, sizes)) < 0:
                raise ConfigurationError(
                    f"ranks of the process group announce {[int(size) for size in sizes]} bytes, of at most "
                    f"{_MOST_BYTES}; run the same version of vllm-efa-ep on every rank"
                )
            own = torch.zeros(longest, dtype=torch.uint8)
            own[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            gathered = [torch.empty_like(own) for _ in range(world_size)]
            dist.all_gather(gathered, own, self._group)
        except RuntimeError as error:
            raise EfaEpError(f"a rank left while all of them were starting: {error}") from error
        return [bytes(each[: int(size)].numpy()) for each, size in zip(gathered, sizes, strict=True)]


@cache  # once in a process, which may build several instances
def _warn_of_no_secret() -> None:
    logger.warning(
        "EFA EP: the run has no secret, so whoever gets into torch's process group is a member; where others "
        "reach these hosts' ports, set EFA_EP_TOKEN_FILE on all of them to a file that holds one"
    )


def _greeting(said: Any) -> tuple[bytes, bytes]:
    nonce, token = map(bytes.fromhex, said)
    if len(nonce) != _NONCE_BYTES or len(token) not in (0, TOKEN_BYTES):
        raise ValueError(f"a nonce has {_NONCE_BYTES} bytes, a token {TOKEN_BYTES}")
    return nonce, token
