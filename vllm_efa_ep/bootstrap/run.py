"""Who belongs to a run: whoever can show a secret that only its members were given."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_efa_ep.errors import ConfigurationError

TOKEN_BYTES = 32
_FEWEST_SECRET_BYTES = 32
_HOW = "`openssl rand -hex 32 > FILE` once, and give the same file to all nodes and to nobody else"


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

    @classmethod
    def of_secret(cls, secret: bytes, nonces: Sequence[bytes]) -> "Run":
        """Return the run of those who have a secret.

        Args:
            secret: It may outlive many runs.
            nonces: One per rank, random and of equal length, so that no run is like one before: what members
                of that one said means nothing in this one.

        """
        joined = b"".join(nonces)
        return cls(hashlib.sha256(joined).hexdigest()[:16], hmac.digest(secret, joined, "sha256"))


def read_secret(file: Path, option: str) -> bytes:
    """Return the secret that a file holds, without white space around it.

    Args:
        file: The same on all nodes.
        option: By which people named it.

    Raises:
        ConfigurationError: It cannot be read, or holds too little to be a secret.

    """
    try:
        secret = file.read_bytes().strip()
    except OSError as error:
        raise ConfigurationError(f"{option} {file}: {error.strerror}; {_HOW}") from error
    if len(secret) < _FEWEST_SECRET_BYTES:
        raise ConfigurationError(
            f"{option} {file} holds {len(secret)} bytes, and a secret has at least {_FEWEST_SECRET_BYTES}; "
            f"{_HOW}"
        )
    return secret
