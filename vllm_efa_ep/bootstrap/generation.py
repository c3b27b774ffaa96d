"""Bootstrap of one generation: the positions of the world, whichever processes serve them now."""

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.bootstrap.key_gather import KeyGather


class GenerationBootstrap:
    """One position of a world after a loss. Every key has the generation's prefix, so none is stale."""

    def __init__(self, bootstrap: Bootstrap, generation: int, position: int, timeout_s: float) -> None:
        """Use the keys of ``bootstrap``, and only those: its group may have lost ranks."""
        self._bootstrap = bootstrap
        self._prefix = f"generation/{generation}"
        self._position = position
        self._gather = KeyGather(position, bootstrap.world_size, timeout_s)

    @property
    def rank(self) -> int:
        """The rank whose position this is."""
        return self._position

    @property
    def world_size(self) -> int:
        """Number of positions; it never changes."""
        return self._bootstrap.world_size

    @property
    def address(self) -> str:
        """Address of the process that serves the position."""
        return self._bootstrap.address

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Gather over keys."""
        return self._gather.all_gather(self, payload)

    def give_up(self, reason: str) -> None:
        """Let the other positions fail at once instead of waiting for this one."""
        self._gather.give_up(self, reason)

    def publish(self, key: str, value: str) -> None:
        """Set a key of this generation."""
        self._bootstrap.publish(f"{self._prefix}/{key}", value)

    def publish_once(self, key: str, value: str) -> str:
        """Set a key of this generation unless it is set."""
        return self._bootstrap.publish_once(f"{self._prefix}/{key}", value)

    def lookup(self, key: str) -> str | None:
        """Get a key of this generation."""
        return self._bootstrap.lookup(f"{self._prefix}/{key}")
