"""A lost rank's position, served by kernels of a live rank's GPU."""

from vllm_efa_ep import _core


class GpuStandIn:
    """What ``_core.StandIn`` is on the CPU (csrc/cuda/stand_in.h)."""

    def __init__(self, device: _core.CudaDevice, host: int, server_host: int, ordinal: int) -> None:
        """Serve from now on.

        Args:
            device: The lost rank's, with its workspace in place.
            host: Address of its pinned memory.
            server_host: Address of the pinned memory of the rank that serves it.
            ordinal: CUDA's number of the GPU.

        """
        self._host = host
        self._core = _core.CudaStandIn(device=device, server_host_address=server_host, gpu=ordinal)

    def start_round(self, channel: int) -> None:
        """Do nothing: it sees when kernels begin a round, also those of a graph that is replayed."""

    def wait_until_idle(self, most_s: float) -> bool:
        """Wait until every round that was begun is over, or ``most_s`` has passed; say which."""
        return self._core.wait_until_idle(most_s)

    def stop(self) -> None:
        """End its thread, and the waits of its kernels."""
        _core.cuda_stop(self._host)
        self._core.stop()

    def throw_if_failed(self) -> None:
        """Raise what ended a round."""
        self._core.throw_if_failed()
