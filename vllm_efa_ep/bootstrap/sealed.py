"""What members of a run tell each other where strangers listen and speak, too.

The store of torch.distributed takes whoever connects to its port, and obeys; its process groups take whoever
comes first. So what goes through them is encrypted and authenticated with the run's token (AES-256-GCM, whose
tag is compared in constant time), each value together with its name: a stranger can neither read one, nor
forge one, nor put one in another's place. He can still destroy, or put back what a member said before under
the same name; that is an error that names the value, or a wait that ends at its deadline.
"""

import os
from base64 import b64decode, b64encode

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch._C._distributed_c10d import PrefixStore, Store

from vllm_efa_ep.bootstrap.run import Run
from vllm_efa_ep.errors import MembershipError

_NONCE_BYTES = 12


class Seal:
    """What only members of a run can read or have written."""

    def __init__(self, run: Run) -> None:
        """Use the run's token."""
        self._name = run.name
        self._cipher = AESGCM(run.token)

    def close(self, name: str, value: bytes) -> bytes:
        """Return a value sealed together with its name."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, value, name.encode())

    def open(self, name: str, sealed: bytes) -> bytes:
        """Return the value.

        Raises:
            MembershipError: It was not sealed by a member, or under another name.

        """
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], name.encode())
        except (ValueError, InvalidTag) as error:
            raise MembershipError(
                f"{name} was written by somebody who is not a member of run {self._name}; let only the run's "
                "hosts reach each other's ports, and give all members one run"
            ) from error


class SealedKeys:
    """The keys of one run."""

    def __init__(self, store: Store, run: Run) -> None:
        """Keep apart, by the run's name, from whatever else uses the store."""
        self._store = PrefixStore(f"vllm_efa_ep/{run.name}", store)
        self._seal = Seal(run)

    def publish(self, key: str, value: str) -> None:
        """Set a key."""
        self._store.set(key, self._close(key, value))

    def publish_once(self, key: str, value: str) -> str:
        """Set a key unless it is set, and return what it holds.

        Raises:
            MembershipError: A stranger has set it.

        """
        return self._open(key, self._store.compare_set(key, "", self._close(key, value)))

    def lookup(self, key: str) -> str | None:
        """Return what a key holds, if it is set.

        Raises:
            MembershipError: A stranger has set it.

        """
        return self._open(key, self._store.get(key)) if self._store.check([key]) else None

    def _close(self, key: str, value: str) -> str:
        return b64encode(self._seal.close(_name(key), value.encode())).decode()

    def _open(self, key: str, text: bytes) -> str:
        try:
            sealed = b64decode(text, validate=True)
        except ValueError:
            sealed = b""
        return self._seal.open(_name(key), sealed).decode()


def _name(key: str) -> str:
    return f"{key} in the store of torch.distributed"
