"""All-gather over published keys, for ranks that no process group joins any more."""

import json
import time
from base64 import b64decode, b64encode
from contextlib import suppress
from typing import Any, Protocol

from vllm_efa_ep.errors import EfaEpError, RankTimeoutError
from vllm_efa_ep.messages import read_json

_FIRST_POLL_SECONDS = 0.001
_LONGEST_POLL_SECONDS = 0.02
# Rank 0 knows who is missing, so it is given the time to say so.
_PATIENCE = 1.1


class Keys(Protocol):
    """The part of a ``Bootstrap`` that works while ranks are dead."""

    def publish(self, key: str, value: str) -> None:
        """Make a value visible to all ranks."""

    def publish_once(self, key: str, value: str) -> str:
        """Make a value visible to all ranks unless the key has one; return the one that stands."""

    def lookup(self, key: str) -> str | None:
        """Return a published value, or None."""


class KeyGather:
    """One rank's part in gatherings that all of ``size`` ranks take part in, in the same order.

    Rank 0 collects and publishes all payloads at once, so that a gathering takes each rank two requests.

    The keys come with each call: a bootstrap that owns its gatherings, and they it, would live until the
    garbage collector finds the cycle, and a process group with it, as late as in the interpreter's end.
    """

    def __init__(self, rank: int, size: int, timeout_s: float) -> None:
        """Take part as ``rank``; a gathering waits for the others for at most ``timeout_s``."""
        self._rank = rank
        self._size = size
        self._timeout_s = timeout_s
        self._gatherings = 0

    def all_gather(self, keys: Keys, payload: bytes) -> list[bytes]:
        """Return every rank's payload, in rank order.

        Raises:
            RankTimeoutError: A rank did not come, or a rank gave up.
            MembershipError: A stranger has written in a rank's place; rank 0 finds out and gives up.
            ConfigurationError: What a rank published is not what this version publishes.

        """
        self._gatherings += 1
        prefix = f"gathering/{self._gatherings}"
        keys.publish(f"{prefix}/{self._rank}", b64encode(payload).decode())
        deadline = time.monotonic() + self._timeout_s * (_PATIENCE if self._rank else 1)
        if self._rank == 0:
            try:
                texts = [self._await(keys, f"{prefix}/{rank}", rank, deadline) for rank in range(self._size)]
            except EfaEpError as error:
                with suppress(EfaEpError):
                    self.give_up(keys, str(error))
                raise
            gathered = json.dumps(texts)
            keys.publish(f"{prefix}/all", gathered)
        else:
            gathered = self._await(keys, f"{prefix}/all", 0, deadline)
        return read_json(gathered, "a gathering over keys", self._payloads)

    def _payloads(self, said: Any) -> list[bytes]:
        payloads = [b64decode(text, validate=True) for text in said]
        if type(said) is not list or len(payloads) != self._size:
            raise ValueError(f"{len(payloads)} payloads are not a list of {self._size}")
        return payloads

    def give_up(self, keys: Keys, reason: str) -> None:
        """Let nobody wait any more. What the first says who gives up is what all hear."""
        keys.publish_once("gathering/ended", f"rank {self._rank}: {reason}")

    def _await(self, keys: Keys, key: str, rank: int, deadline: float) -> str:
        pause_s = _FIRST_POLL_SECONDS
        while (text := keys.lookup(key)) is None:
            what = f"the start on rank {self._rank} waited for rank {rank}"
            if (reason := keys.lookup("gathering/ended")) is not None:
                raise RankTimeoutError(f"{what}, but it was given up by {reason}", "start", 0, (rank,))
            if time.monotonic() > deadline:
                raise RankTimeoutError(f"{what} for {self._timeout_s:g} s", "start", 0, (rank,))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL_SECONDS)
        return text
