"""Who belongs to a run: whoever can show a secret that only its members were given."""

import hmac
import secrets
from dataclasses import dataclass, field

TOKEN_BYTES = 32


def new_token() -> bytes:
    """Return a secret that nobody guesses."""
    return secrets.token_bytes(TOKEN_BYTES)


def is_member(offered: bytes, token: bytes) -> bool:
    """Compare in constant time: how long it takes tells nothing about how much of the token is right."""
    return hmac.compare_digest(offered, token)


@dataclass(frozen=True)
class Run:
    """One start of one world.

    Attributes:
        name: Under which members find each other; no secret.
        token: Proves that a process is a member. Give it to members only, and never log it.

    """

    name: str
    token: bytes = field(repr=False)

    @classmethod
    def new(cls) -> "Run":
        """Return a run of which nobody is a member yet."""
        return cls(secrets.token_hex(8), new_token())
