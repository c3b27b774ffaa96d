"""GPU arenas on a driver whose memory is memfds: what one process writes, another reads through the fd."""

import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda.bindings import driver as cuda
from fake_driver import FakeDriver

from vllm_efa_ep.bootstrap.descriptors import DescriptorExchange
from vllm_efa_ep.cuda.arena import DeviceArena
from vllm_efa_ep.cuda.driver import open_gpu, require_rdma
from vllm_efa_ep.cuda.kept_memory import KeptMemory
from vllm_efa_ep.cuda.memory import DeviceMemory, PinnedMemory
from vllm_efa_ep.errors import ConfigurationError, CudaError, DeviceUnavailableError

RESULT = cuda.CUresult
ATTRIBUTE = cuda.CUdevice_attribute


def _open_descriptors() -> set[str]:
    return {each.name for each in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    """A driver with one GPU; whatever a test leaves allocated is an error."""
    fake = FakeDriver().install()
    yield fake
    fake.remove()
    assert not fake.live


def test_an_arena_is_zero_rounded_up_and_given_back(driver: FakeDriver) -> None:
    """Flags in it must start at 0, and device memory does not."""
    arena = DeviceArena.create(open_gpu(0), 3 << 20)
    assert arena.bytes == 4 << 20
    assert ctypes.string_at(arena.address, arena.bytes) == bytes(arena.bytes)
    assert arena.view(64, 128).__cuda_array_interface__["data"] == (arena.address + 64, False)
    descriptor = arena.descriptor
    arena.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert driver.calls().count("cuMemUnmap") == driver.calls().count("cuMemMap") == 1


def test_a_mapped_arena_is_the_same_memory(driver: FakeDriver) -> None:
    """Also after the owner has let go: the mapping keeps the memory."""
    gpu = open_gpu(0)
    own = DeviceArena.create(gpu, 2 << 20)
    peer = DeviceArena.map(gpu, own.descriptor, own.bytes)
    assert peer.address != own.address
    assert peer.descriptor == -1
    ctypes.memmove(own.address + 4096, b"over the fd", 11)
    assert ctypes.string_at(peer.address + 4096, 11) == b"over the fd"
    own.close()
    assert ctypes.string_at(peer.address + 4096, 11) == b"over the fd"
    peer.close()
    assert not driver.live


def test_a_fabric_handle_is_the_same_memory(driver: FakeDriver) -> None:
    """64 bytes, which any channel carries to any host of the NVLink domain; there is no descriptor."""
    gpu = open_gpu(0)
    own = DeviceArena.create(gpu, 2 << 20, fabric=True)
    assert own.descriptor == -1
    assert len(own.fabric_handle) == 64
    peer = DeviceArena.map(gpu, own.fabric_handle, own.bytes)
    assert peer.fabric_handle == b""
    ctypes.memmove(own.address, b"over NVLink", 11)
    assert ctypes.string_at(peer.address, 11) == b"over NVLink"
    with pytest.raises(ConfigurationError, match="fabric handle of 3 bytes"):
        DeviceArena.map(gpu, b"abc", own.bytes)
    own.close()
    peer.close()
    assert not driver.live


def test_a_gpu_outside_of_a_domain_has_no_fabric_handles(driver: FakeDriver) -> None:
    """The same without the right to an IMEX channel: the error names it."""
    gpu = open_gpu(0)
    driver.refuse("cuMemCreate", RESULT.CUDA_ERROR_NOT_PERMITTED)
    with pytest.raises(CudaError, match="IMEX channel"):
        DeviceArena.create(gpu, 2 << 20, fabric=True)
    driver.attributes[ATTRIBUTE.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED] = 0
    with pytest.raises(DeviceUnavailableError, match="EFA_EP_GPU_HANDLES=descriptor"):
        DeviceArena.create(gpu, 2 << 20, fabric=True)


def test_the_next_arena_takes_the_place_of_the_last(driver: FakeDriver) -> None:
    """What a captured graph, or a tensor of the last one, refers to is the new memory; peers keep the old."""
    gpu, kept = open_gpu(0), KeptMemory()
    last = kept.arena(gpu, 2 << 20, fabric=False)
    address = last.address
    peer = DeviceArena.map(gpu, last.descriptor, last.bytes)
    ctypes.memmove(address, b"last", 4)
    following = kept.arena(gpu, 2 << 20, fabric=False)
    assert following.address == address
    assert ctypes.string_at(address, 4) == bytes(4)
    ctypes.memmove(peer.address, b"late", 4)
    assert ctypes.string_at(address, 4) == bytes(4)
    kept.close()
    del last, following
    peer.close()
    assert not driver.live


_PEER = """
import ctypes, sys
from fake_driver import FakeDriver
from vllm_efa_ep.bootstrap.descriptors import DescriptorExchange
from vllm_efa_ep.cuda.arena import DeviceArena
from vllm_efa_ep.cuda.driver import open_gpu
FakeDriver().install()
gpu = open_gpu(0)
own = DeviceArena.create(gpu, 2 << 20)
exchange = DescriptorExchange(1, 2)
print(exchange.invitation, flush=True)
invitations = [sys.stdin.readline().strip(), exchange.invitation]
(descriptor,) = exchange.exchange(own.descriptor, invitations, 20).values()
theirs = DeviceArena.map(gpu, descriptor, own.bytes)
ctypes.memmove(theirs.address, b"from rank 1", 11)
print(ctypes.string_at(own.address, 11).decode() if sys.stdin.readline() else "", flush=True)
"""


def test_two_processes_share_memory_through_the_descriptor_exchange(driver: FakeDriver) -> None:
    """The start of a node of two ranks: create, pass the descriptors over Unix sockets, map, write."""
    gpu = open_gpu(0)
    own = DeviceArena.create(gpu, 2 << 20)
    exchange = DescriptorExchange(0, 2)
    peer = subprocess.Popen(
        [sys.executable, "-c", _PEER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
    )
    assert peer.stdin is not None
    assert peer.stdout is not None
    peer_name = peer.stdout.readline().strip()
    peer.stdin.write(exchange.invitation + "\n")
    peer.stdin.flush()
    received = exchange.exchange(own.descriptor, [exchange.invitation, peer_name], 20)
    theirs = DeviceArena.map(gpu, received[1], own.bytes)
    os.close(received[1])
    ctypes.memmove(theirs.address, b"from rank 0", 11)
    told, _ = peer.communicate("read\n", timeout=20)
    assert told.strip() == "from rank 0"
    assert ctypes.string_at(own.address, 11) == b"from rank 1"
    exchange.close()
    own.close()
    theirs.close()
    assert not driver.live


def test_a_dmabuf_is_the_same_memory_or_absent(driver: FakeDriver) -> None:
    """Drivers without dma-buf leave NICs the address."""
    arena = DeviceArena.create(open_gpu(0), 2 << 20)
    dmabuf = arena.export_dmabuf()
    ctypes.memmove(arena.address, b"bytes", 5)
    assert os.pread(dmabuf, 5, 0) == b"bytes"
    os.close(dmabuf)
    arena.close()
    driver.attributes[ATTRIBUTE.CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED] = 0
    arena = DeviceArena.create(open_gpu(0), 2 << 20)
    assert arena.export_dmabuf() == -1
    arena.close()


@pytest.mark.parametrize(
    ("name", "result", "expected"),
    [
        (
            "cuMemCreate",
            RESULT.CUDA_ERROR_OUT_OF_MEMORY,
            "allocating 4194304 bytes on GPU 0.*lower max_tokens",
        ),
        ("cuMemExportToShareableHandle", RESULT.CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"),
        ("cuMemAddressReserve", RESULT.CUDA_ERROR_OUT_OF_MEMORY, "cuMemAddressReserve"),
        ("cuMemMap", RESULT.CUDA_ERROR_INVALID_VALUE, "mapping 4194304 bytes for GPU 0: cuMemMap"),
        ("cuMemSetAccess", RESULT.CUDA_ERROR_NOT_SUPPORTED, "cuMemSetAccess"),
        ("cuMemsetD8", RESULT.CUDA_ERROR_LAUNCH_FAILED, "cuMemsetD8"),
    ],
)
def test_whatever_fails_nothing_stays_behind(
    driver: FakeDriver, name: str, result: object, expected: str
) -> None:
    """Each call of a creation, refused in turn; the fixture looks for leaks."""
    gpu = open_gpu(0)
    before = _open_descriptors()
    driver.refuse(name, result)
    with pytest.raises(CudaError, match=expected):
        DeviceArena.create(gpu, 3 << 20)
    assert _open_descriptors() == before


def test_a_peer_out_of_reach(driver: FakeDriver) -> None:
    """Two GPUs without NVLink or PCIe peer access: the driver refuses, and the error says the remedy."""
    gpu = open_gpu(0)
    own = DeviceArena.create(gpu, 2 << 20)
    driver.refuse("cuMemSetAccess", RESULT.CUDA_ERROR_INVALID_DEVICE)
    with pytest.raises(
        DeviceUnavailableError, match=r"cannot reach a local peer's GPU.*EFA_EP_RANKS_PER_NODE=1"
    ):
        DeviceArena.map(gpu, own.descriptor, own.bytes)
    own.close()


@pytest.mark.parametrize(
    ("name", "result", "remedy"),
    [
        ("cuInit", RESULT.CUDA_ERROR_NO_DEVICE, "CUDA_VISIBLE_DEVICES"),
        ("cuInit", RESULT.CUDA_ERROR_SYSTEM_NOT_READY, "nvidia-fabricmanager"),
        ("cuInit", RESULT.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "reboot"),
        ("cuDeviceGet", RESULT.CUDA_ERROR_INVALID_DEVICE, "opening GPU 0"),
        ("cuDevicePrimaryCtxRetain", RESULT.CUDA_ERROR_OUT_OF_MEMORY, "used up"),
    ],
)
def test_a_gpu_that_cannot_be_opened(driver: FakeDriver, name: str, result: object, remedy: str) -> None:
    """The reasons that operators meet, with their remedies."""
    driver.refuse(name, result)
    with pytest.raises(DeviceUnavailableError, match=remedy):
        open_gpu(0)


@pytest.mark.parametrize(
    ("attribute", "text"),
    [
        (
            ATTRIBUTE.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            "lacks virtual memory management",
        ),
        (ATTRIBUTE.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, "file descriptors"),
        (ATTRIBUTE.CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED, "NICs cannot reach"),
        (
            ATTRIBUTE.CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING,
            r"may not see what NICs have written .* is 0, below 100\); use a GPU from Hopper on",
        ),
    ],
)
def test_a_gpu_that_lacks_something(driver: FakeDriver, attribute: object, text: str) -> None:
    """The attribute is named, so that people can look it up."""
    driver.attributes[attribute] = 0
    with pytest.raises(DeviceUnavailableError, match=text) as error:
        require_rdma(open_gpu(0))
    assert "CU_DEVICE_ATTRIBUTE" in str(error.value)


@pytest.mark.parametrize(("ordering", "records"), [(100, 1), (200, 0)])
def test_a_gpu_orders_what_nics_write(
    driver: FakeDriver, caplog: pytest.LogCaptureFixture, ordering: int, records: int
) -> None:
    """For itself at least: ranks of its node hear of rows from its kernels, and operators of this."""
    driver.attributes[ATTRIBUTE.CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING] = ordering
    with caplog.at_level(logging.INFO, "vllm_efa_ep"):
        require_rdma(open_gpu(0))
    assert len(caplog.records) == records
    assert all("for its own kernels only" in each.message for each in caplog.records)


def test_pinned_and_plain_device_memory_are_zero_and_given_back(driver: FakeDriver) -> None:
    """The rings and words that live there start at 0."""
    pinned, plain = PinnedMemory(4096), DeviceMemory(8192)
    assert ctypes.string_at(pinned.address, 4096) == bytes(4096)
    assert ctypes.string_at(plain.address, 8192) == bytes(8192)
    plain.write(b"state")
    assert ctypes.string_at(plain.address, 8) == b"state\0\0\0"
    pinned.close()
    plain.close()
    assert not driver.live


def test_without_a_driver_the_error_says_so() -> None:
    """As on every machine of the CI: importing works, opening a GPU is refused with the remedy."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a driver")
    with pytest.raises(DeviceUnavailableError, match="no usable NVIDIA driver"):
        open_gpu(0)
