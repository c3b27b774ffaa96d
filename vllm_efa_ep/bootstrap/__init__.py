"""How ranks find each other before the fabric is up. One interface, one implementation per launcher."""

from typing import Protocol


class Bootstrap(Protocol):
    """A slow, reliable channel between all ranks, used to start and to explain failures.

    ``publish``, ``publish_once`` and ``lookup`` must work while other ranks are dead, and in several threads
    at once; they raise ``EfaEpError`` if the service behind them is gone.
    """

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    @property
    def address(self) -> str:
        """IP address at which other hosts reach this one, if there are any."""

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Collective: return every rank's payload, in rank order."""

    def publish(self, key: str, value: str) -> None:
        """Make a value visible to all ranks."""

    def publish_once(self, key: str, value: str) -> str:
        """Make a value visible to all ranks unless the key has one; return the one that stands. Atomic."""

    def lookup(self, key: str) -> str | None:
        """Return a published value, or None if there is none yet. Does not wait."""
