"""What a launcher does on the host: faults of kernels as errors, halves in order, no GPU as an error."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vllm_efa_ep import AllToAllConfig, _core
from vllm_efa_ep.errors import ConfigurationError, CudaError, ProtocolError, RankTimeoutError

RING = 16
CONFIG = AllToAllConfig(64, 8, 2, 12)
LAYOUT = CONFIG.core_layout(world_size=4, ranks_per_node=2)


def make_device(host: int, **changes: Any) -> _core.CudaDevice:
    """Return rank 1 of 4; ``host`` is 0s that it takes for pinned memory."""
    arguments: dict[str, Any] = {
        "layout": CONFIG.core_layout(world_size=2, ranks_per_node=2),
        "rank": 1,
        "expert_owner": CONFIG.placement(2),
        "combine_type": _core.ScalarType.bfloat16,
        "per_expert": False,
        "timeout_s": 2.5,
        "num_sms": 1,
        "quantisation": _core.Quantisation.none,
        "chunk_bytes": 1000,
        "arenas": [4096, 8192],
        "host_address": host,
        "host_address_on_device": host,
        "ring_commands": RING,
        "signals_in_arena": False,
        "proxy": None,
        "check_wait": lambda *_: None,
    }
    return _core.CudaDevice(**arguments | changes)


@dataclass
class Host:
    """Memory in the place of pinned memory, and a device that watches it."""

    address: int
    device: _core.CudaDevice

    def report(self, fault: int, half: int, channel: int, rank: int, round_number: int, detail: int) -> None:
        """Write an error as kernels do (csrc/cuda/device_error.h), the first word last."""
        words = (ctypes.c_uint64 * 2).from_address(self.address)
        words[1] = detail % 2**64
        words[0] = round_number << 32 | rank << 16 | channel << 12 | half << 8 | fault


@pytest.fixture
def host() -> Iterator[Host]:
    """A device whose error word is 0."""
    buffer = ctypes.create_string_buffer(_core.cuda_host_bytes(RING, LAYOUT) + 64)
    address = -(-ctypes.addressof(buffer) // 64) * 64
    yield Host(address, make_device(address))
    del buffer


FAULTS = {
    1: (RankTimeoutError, "dispatch_recv of round 7 on rank 1 waited 2.5.* s for rank 3"),
    2: (RankTimeoutError, "dispatch_recv of round 7 on rank 1 was ended by the host"),
    3: (ConfigurationError, "given 99 tokens, but a rank may dispatch 12"),
    4: (ConfigurationError, r"given expert id 99, but ids are -1 \(dropped\) to 7"),
    5: (ProtocolError, "rank 3 announces 99 rows"),
    6: (ProtocolError, "the list of rank 3 names row 99"),
    7: (ProtocolError, "a row from rank 3 names expert 99"),
    8: (ProtocolError, "error word 8 is unknown"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernels_fault_is_the_error_of_every_later_call(host: Host, fault: int) -> None:
    """The same types as on the CPU, with the half, the round and the rank."""
    host.device.throw_if_failed()
    host.report(fault, half=1, channel=0, rank=3, round_number=7, detail=99)
    kind, text = FAULTS[fault]
    for _ in range(2):
        with pytest.raises(kind, match=text):
            host.device.throw_if_failed()
    with pytest.raises(kind, match=text):
        host.device.dispatch_recv(0, 0, 0, 0, 0, 0, 0)


def test_a_timeout_carries_what_was_waited_for(host: Host) -> None:
    """What the diagnosis and vLLM's fault tolerance read."""
    host.report(1, half=3, channel=0, rank=2, round_number=41, detail=0)
    with pytest.raises(RankTimeoutError) as error:
        host.device.throw_if_failed()
    assert (error.value.half, error.value.round, error.value.missing) == ("combine_recv", 41, (2,))


def test_negative_expert_ids_survive_the_word(host: Host) -> None:
    """The detail is signed."""
    host.report(4, half=0, channel=0, rank=1, round_number=1, detail=-7)
    with pytest.raises(ConfigurationError, match="expert id -7"):
        host.device.throw_if_failed()


def test_halves_out_of_turn_and_arguments_out_of_range_are_refused(host: Host) -> None:
    """Before anything is launched."""
    for call in (
        lambda: host.device.dispatch_recv(0, 0, 0, 0, 0, 0, 0),
        lambda: host.device.combine_send(0, 0, 0, False, True),
        lambda: host.device.combine_recv(0, 0, 0),
    ):
        with pytest.raises(ConfigurationError, match="came out of turn on channel 0"):
            call()
    with pytest.raises(ConfigurationError, match="channel 1 does not exist"):
        host.device.dispatch_send(1, 0, 0, 0, 0, 0, False, 0, 1, 0)
    with pytest.raises(ConfigurationError, match="may dispatch 12 tokens, not 13"):
        host.device.dispatch_send(0, 0, 0, 0, 0, 0, False, 0, 13, 0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"arenas": [4096]}, "arena of every rank of its node"),
        ({"ring_commands": 48}, "EFA_EP_RING_COMMANDS to a power of two"),
        ({"layout": LAYOUT}, "a proxy if there are several nodes"),
    ],
)
def test_what_a_device_cannot_be_built_from(host: Host, changes: dict[str, Any], text: str) -> None:
    """The message names the setting where there is one."""
    with pytest.raises(ConfigurationError, match=text):
        make_device(host.address, **changes)


def test_the_workspace_starts_with_the_state(host: Host) -> None:
    """The host copies what the kernels read; the rest of the workspace is the kernels' own."""
    image = host.device.use_workspace(1 << 20)
    assert 0 < len(image) < host.device.workspace_bytes
    state = bytes(image)
    assert (8192).to_bytes(8, "little") in state  # the own arena, in the table of arenas
    assert (1 << 20 | 0).to_bytes(8, "little")[:3] in state  # tables lie in the workspace


def test_a_launch_without_a_gpu_is_a_cuda_error(host: Host) -> None:
    """The runtime, or a build without kernels, says why; the process lives."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    host.device.use_workspace(1 << 20)
    with pytest.raises(CudaError, match=r"driver is missing|no CUDA kernels"):
        host.device.dispatch_send(0, 0, 0, 16, 0, 0, False, 0, 1, 0)
