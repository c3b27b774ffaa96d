"""What the built module contains and needs, and that it can be imported where there is no GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_efa_ep
from vllm_efa_ep import AllToAllConfig, _core
from vllm_efa_ep.errors import DeviceUnavailableError
from vllm_efa_ep.rank_memory import resolve_device

MODULE = Path(_core.__file__)
needs_kernels = pytest.mark.skipif(not vllm_efa_ep.__cuda__, reason="this build has no CUDA kernels")


def test_the_module_needs_no_cuda_library() -> None:
    """A machine without a driver has no libcuda, and libcudart is on no library path."""
    needed = subprocess.run(["readelf", "-d", MODULE], capture_output=True, text=True, check=True).stdout
    libraries = [line for line in needed.splitlines() if "NEEDED" in line]
    assert libraries
    assert not [line for line in libraries if "libcuda" in line or "libcudart" in line]


def test_the_module_is_imported_without_a_driver_and_without_cuda_python() -> None:
    """What every machine of a CPU cluster, and every vLLM process, does."""
    program = (
        "import sys; sys.modules['cuda'] = None; import vllm_efa_ep; from vllm_efa_ep import AllToAll; "
        "print(vllm_efa_ep.__cuda__)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[0] == str(vllm_efa_ep.__cuda__)


@needs_kernels
def test_the_module_holds_machine_code_for_every_architecture_it_names() -> None:
    """And for no other, and no PTX, which "a" architectures cannot share."""
    cuobjdump = importlib.util.find_spec("nvidia.cu13")
    if cuobjdump is None or not cuobjdump.submodule_search_locations:
        pytest.skip("nvidia-cuda-cuobjdump is not installed")
    program = Path(next(iter(cuobjdump.submodule_search_locations))) / "bin/cuobjdump"
    listed = subprocess.run(
        [program, "--list-elf", "--list-ptx", MODULE], capture_output=True, text=True, check=True
    ).stdout
    elves = [line for line in listed.splitlines() if line.startswith("ELF")]
    assert {line.split(".")[-2] for line in elves} == set(vllm_efa_ep.__cuda__)
    kernels = {line.split(".")[-3] for line in elves}
    assert len(kernels) == len(elves)
    assert not [line for line in listed.splitlines() if line.startswith("PTX")]


def test_a_build_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """No silent fallback to the CPU: whoever asks for CUDA learns what to install."""
    monkeypatch.setattr(_core, "cuda_architectures", "")
    assert vllm_efa_ep.__cuda__ == ()
    with pytest.raises(DeviceUnavailableError, match="no CUDA kernels"):
        resolve_device("cuda")
    assert resolve_device("cpu") == "cpu"


def test_a_machine_without_a_gpu_takes_cpu_tensors() -> None:
    """The default asks torch."""
    import torch

    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device(AllToAllConfig(16, 1, 1, 1).device) == expected
