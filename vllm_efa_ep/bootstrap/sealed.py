"""Keys in a store that everybody may reach: what is in them only members of a run can read or have written.

The store of torch.distributed takes whoever connects to its port, and obeys. So values are encrypted and
authenticated with the run's token (AES-256-GCM, whose tag is compared in constant time), each together with
its key: a stranger can neither read one, nor forge one, nor put one in another's place. He can still destroy;
what is destroyed is an error that names the key, or a wait that ends at its deadline.
"""

import os
from base64 import b64decode, b64encode

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch._C._distributed_c10d import PrefixStore, Store

from vllm_efa_ep.bootstrap.run import Run
from vllm_efa_ep.errors import MembershipError

_NONCE_BYTES = 12


class SealedKeys:
    """The keys of one run."""

    def __init__(self, store: Store, run: Run) -> None:
        """Keep apart, by the run's name, from whatever else uses the store."""
        self._store = PrefixStore(f"vllm_efa_ep/{run.name}", store)
        self._name = run.name
        self._cipher = AESGCM(run.token)

    def publish(self, key: str, value: str) -> None:
        """Set a key."""
        self._store.set(key, self._seal(key, value))

    def publish_once(self, key: str, value: str) -> str:
        """Set a key unless it is set, and return what it holds.

        Raises:
            MembershipError: A stranger has set it.

        """
        return self._open(key, self._store.compare_set(key, "", self._seal(key, value)))

    def lookup(self, key: str) -> str | None:
        """Return what a key holds, if it is set.

        Raises:
            MembershipError: A stranger has set it.

        """
        return self._open(key, self._store.get(key)) if self._store.check([key]) else None

    def _seal(self, key: str, value: str) -> str:
        nonce = os.urandom(_NONCE_BYTES)
        return b64encode(nonce + self._cipher.encrypt(nonce, value.encode(), key.encode())).decode()

    def _open(self, key: str, sealed: bytes) -> str:
        try:
            whole = b64decode(sealed, validate=True)
            return self._cipher.decrypt(whole[:_NONCE_BYTES], whole[_NONCE_BYTES:], key.encode()).decode()
        except (ValueError, InvalidTag) as error:
            raise MembershipError(
                f"{key} in the store of torch.distributed was written by somebody who is not a member of run "
                f"{self._name}; let only the run's hosts reach the store's port, and give all members one run"
            ) from error
