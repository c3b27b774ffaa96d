"""The four halves as kernels in torch's current stream, behind the interface of the CPU's halves."""

from typing import Any

from vllm_efa_ep import _core
from vllm_efa_ep.cuda.driver import call
from vllm_efa_ep.cuda.streams import current_stream, is_capturing, require_current
from vllm_efa_ep.errors import ConfigurationError

_NO_EXPERT = 0xFFFFFFFF  # -1


class CudaHalves:
    """Launches in the order of the calls. Inputs and outputs must stay as they are until the stream is past.

    Nothing waits for the GPU but ``dispatch_recv`` in the per_token layout, which has to know the number of
    rows. While a CUDA graph is captured it does not either: it returns the most rows there can be, and gives
    rows that did not come the expert ids -1.
    """

    def __init__(self, core: _core.CudaDevice, layout: _core.Layout, per_expert: bool, ordinal: int) -> None:
        """Take over a device with its workspace in place on a GPU."""
        self._core = core
        self._ordinal = ordinal
        self._capacity = layout.result_rows
        self._top_k = layout.top_k
        self._per_expert = per_expert

    def dispatch_send(
        self,
        channel: int,
        x: int,
        x_stride: int,
        scales: int,
        ids: int,
        ids_are_64_bit: bool,
        weights: int,
        tokens: int,
        token_count: int,
    ) -> None:
        """Launch the start of a round."""
        stream = self._stream()
        self._core.dispatch_send(
            channel, stream, x, x_stride, scales, ids, ids_are_64_bit, weights, tokens, token_count
        )

    def dispatch_recv(
        self, channel: int, room: int, x: int, scales: int, ids: int, weights: int, tokens_per_expert: int
    ) -> int:
        """Launch the receipt; ``room`` is for all rows there can be."""
        if room < self._capacity:
            raise ConfigurationError(f"kernels need room for {self._capacity} rows, not {room}")
        stream = self._stream()
        fixed_shape = self._per_expert or is_capturing()
        if fixed_shape and ids:
            slots = self._capacity * self._top_k
            call("dropping rows that do not come", "cuMemsetD32Async", ids, _NO_EXPERT, slots, stream)
        self._core.dispatch_recv(channel, stream, x, scales, ids, weights, tokens_per_expert)
        if fixed_shape:
            return self._capacity
        return self._core.wait_for_rows(channel, stream)

    def dispatch_pack(
        self,
        channel: int,  # noqa: ARG002
        x: int,  # noqa: ARG002
        scales: int,  # noqa: ARG002
        ids: int,  # noqa: ARG002
        weights: int,  # noqa: ARG002
        tokens_per_expert: int,  # noqa: ARG002
    ) -> None:
        """Not needed: there is room for everything."""
        raise ConfigurationError("dispatch_recv has packed all rows already")

    def combine_send(self, channel: int, rows: int, per_slot: bool, weights_applied: bool) -> None:
        """Launch the sending of results."""
        self._core.combine_send(channel, self._stream(), rows, per_slot, weights_applied)

    def combine_recv(self, channel: int, out: int) -> None:
        """Launch the receipt of the own tokens' results."""
        self._core.combine_recv(channel, self._stream(), out)

    def _stream(self) -> int:
        require_current(self._ordinal)
        return current_stream()

    def counters(self) -> dict[str, Any]:
        """Return what the kernels have counted, in replayed graphs, too; asks the GPU nothing."""
        return self._core.counters()

    def half_seconds(self) -> dict[str, float]:
        """Return what the kernels have measured; a round counts when the next one has begun."""
        return self._core.half_seconds()

    def wait_seconds(self) -> dict[str, float]:
        """Return the longest wait of each kernel, added up."""
        return self._core.wait_seconds()

    def half_buckets(self) -> dict[str, list[int]]:
        """Return a histogram of ``half_seconds``."""
        return self._core.half_buckets()

    def wait_buckets(self) -> dict[str, list[int]]:
        """Return a histogram of ``wait_seconds``."""
        return self._core.wait_buckets()

    def waited_for_seconds(self) -> list[float]:
        """Return the waits of ``wait_seconds`` by the rank that ended them."""
        return self._core.waited_for_seconds()

    def trace(self) -> list[dict[str, Any]]:
        """Return nothing: spans on a GPU are a profiler's matter; the network's are the proxy's."""
        return []

    def dropped_spans(self) -> int:
        """Nothing was kept, so nothing was replaced."""
        return 0
