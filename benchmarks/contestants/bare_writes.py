"""Floor of the network: the payload bytes each way as bare fabric writes (``benchmarks/bare_writes.cpp``)."""

import ctypes
from collections.abc import Callable
from typing import Any, cast

from vllm_efa_ep.bench.contestants.contestant import Contestant, Workplace
from vllm_efa_ep.bench.problem import Problem

ADDRESS_CAPACITY = 4096
_VOID_P, _CHAR_P, _U32, _U64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint64
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "error": (_CHAR_P, ()),
    "open": (_VOID_P, (_CHAR_P, _CHAR_P, _CHAR_P, _U32, _U32, _U64, _U64)),
    "address": (_U64, (_VOID_P, _VOID_P, _U64)),
    "connect": (ctypes.c_int, (_VOID_P, _U32, _CHAR_P, _U64)),
    "exchange": (ctypes.c_int, (_VOID_P, _VOID_P, _VOID_P, _U32)),
    "close": (None, (_VOID_P,)),
}


class BareWrites(Contestant):
    """Each rank writes the bytes of its rows to their owners, then those of its outputs to their sources.

    Rows between a rank and itself do not cross the network and are left out. The writes have the length of
    this package's chunks; a half ends when the peers' writes have arrived and the own ones are gone.
    """

    name = "bare_writes"

    def __init__(self, problem: Problem, workplace: Workplace) -> None:
        """Open an endpoint and connect it to all ranks."""
        super().__init__(problem, workplace)
        self._library = ctypes.CDLL(workplace.bare_writes_library)
        row_bytes, world = problem.cell.row_bytes, problem.cell.world
        settings = workplace.settings
        self._handle = self._call("open")(
            settings.libfabric.encode(),
            settings.provider.encode(),
            settings.interface.encode(),
            problem.rank,
            world,
            problem.cell.tokens * row_bytes,
            settings.chunk_bytes,
        )
        self._require(self._handle)
        address = ctypes.create_string_buffer(ADDRESS_CAPACITY)
        length = self._call("address")(self._handle, address, ADDRESS_CAPACITY)
        self._require(0 < length <= ADDRESS_CAPACITY)
        for peer, peer_address in enumerate(workplace.mpi.allgather(address.raw[:length])):
            if peer != problem.rank:
                connected = self._call("connect")(self._handle, peer, peer_address, len(peer_address))
                self._require(connected == 0)
        workplace.mpi.Barrier()
        table = _U64 * world
        self._sent = table(*(rows * row_bytes for rows in problem.sent_rows))
        self._received = table(*(rows * row_bytes for rows in problem.received_rows))
        self._exchange = self._call("exchange")

    def _call(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, f"bare_writes_{name}")
        function.restype, function.argtypes = SIGNATURES[name]
        return cast("Callable[..., Any]", function)

    def _require(self, succeeded: object) -> None:
        if not succeeded:
            raise RuntimeError(self._call("error")().decode())

    def dispatch(self) -> None:
        """Write the bytes of the rows."""
        self._require(self._exchange(self._handle, self._sent, self._received, self.problem.cell.world) == 0)

    def combine(self) -> None:
        """Write the bytes of the outputs back."""
        self._require(self._exchange(self._handle, self._received, self._sent, self.problem.cell.world) == 0)

    def check(self) -> None:
        """Nothing to compare: the writes carry no tokens."""

    def close(self) -> None:
        """Close the endpoint."""
        self._call("close")(self._handle)
