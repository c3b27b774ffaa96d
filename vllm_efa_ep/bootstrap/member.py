"""What the bootstraps have in common whose keys are kept elsewhere: at a coordinator, or in a store."""

from abc import ABC, abstractmethod
from typing import Any

from vllm_efa_ep.bootstrap.run import Run


class Member(ABC):
    """One rank of a run. Each request is one of the three on keys, and has a deadline."""

    def __init__(self, run: Run, rank: int, world_size: int) -> None:
        """Be ``rank`` of ``world_size``."""
        self.run = run
        self._rank = rank
        self._world_size = world_size

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    def publish(self, key: str, value: str) -> None:
        """Make a value visible to all ranks."""
        self.request("publish", key, value)

    def publish_once(self, key: str, value: str) -> str:
        """Make a value visible to all ranks unless the key has one; return the one that stands."""
        standing: str = self.request("publish_once", key, value)
        return standing

    def lookup(self, key: str) -> str | None:
        """Return a published value, or None if there is none yet."""
        value: str | None = self.request("lookup", key)
        return value

    @abstractmethod
    def request(self, name: str, *arguments: str) -> Any:
        """Let whoever keeps the keys do what the method of this name says, and return the answer.

        Raises:
            EfaEpError: There is none in time.

        """
