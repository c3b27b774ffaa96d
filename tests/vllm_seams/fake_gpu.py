"""vLLM as on a GPU, without one: what stands in for vLLM's compiled code, the driver and ``torch.cuda``.

Tensors are CPU tensors, which our kernels on fibers and torch both reach. Of vLLM, only what its sources lack
is replaced: the compiled operators that the tests need, in plain torch, and the questions to the driver.
"""

import contextlib
import ctypes
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch

# Extensions that are imported for the operators they register, and for nothing else.
_EXTENSIONS = ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa2_C")
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

_library = torch.library.Library("_C", "FRAGMENT")
_thread = threading.local()
capturing = False


class Stream:
    """A stream of the fibers' engine, in the place of ``torch.cuda.Stream``."""

    new_stream: Any = None

    def __init__(self, **_: object) -> None:
        """Create one."""
        self.cuda_stream = Stream.new_stream(0)

    def is_capturing(self) -> bool:
        """Whether a test plays a capture."""
        return capturing

    def wait_stream(self, _: object) -> None:
        """Nothing runs asynchronously: every half is waited for."""

    def wait_event(self, _: object) -> None:
        """As ``wait_stream``."""


class Event:
    """An event in streams that do nothing asynchronously."""

    def record(self, _: object = None) -> None:
        """Nothing to remember."""


def _current_stream() -> Stream:
    if not hasattr(_thread, "stream"):
        _thread.stream = Stream()
    stream: Stream = _thread.stream
    return stream


def fake_torch_cuda(library: ctypes.CDLL) -> None:
    """Let torch answer as with one GPU whose streams are the engine's; before vLLM is imported."""
    Stream.new_stream = library.simt_new_stream
    torch.cuda.Stream = Stream  # type: ignore[assignment,misc]
    torch.Event = Event  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda *_: _current_stream()  # type: ignore[assignment]
    torch.cuda.set_stream = lambda stream: setattr(_thread, "stream", stream)
    torch.cuda.is_current_stream_capturing = lambda: capturing
    torch.cuda.current_device = lambda: 0
    accelerator = torch.accelerator
    accelerator.current_stream = lambda *_: _current_stream()  # type: ignore[assignment]
    accelerator.current_device_index = lambda: 0
    accelerator.set_device_index = lambda _: None
    accelerator.empty_cache = lambda: None


@contextlib.contextmanager
def capture() -> Iterator[None]:
    """Play the capture of a CUDA graph."""
    global capturing
    capturing = True
    try:
        yield
    finally:
        capturing = False


def import_vllm_for_cuda() -> None:
    """Import vLLM's sources on a platform that is CUDA's with one Hopper GPU."""
    for name in _EXTENSIONS:
        sys.modules[name] = types.ModuleType(name)
    for name in (
        "cutlass_scaled_mm_supports_fp8",
        "cutlass_scaled_mm_supports_block_fp8",
        "cutlass_scaled_mm_supports_fp4",
        "cutlass_group_gemm_supported",
    ):
        _operator(f"{name}(int capability) -> bool", lambda _: False)
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class OneGpu(NonNvmlCudaPlatform):  # type: ignore[misc]
        dispatch_key = "CPU"  # of vLLM's operators in Python, whose tensors are torch's on the CPU

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:  # noqa: ARG003
            return DeviceCapability(9, 0)

        @classmethod
        def device_count(cls) -> int:
            return 1

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:  # noqa: ARG003
            return 132

    vllm.platforms.current_platform = OneGpu()
    import vllm.model_executor.layers.fused_moe.modular_kernel

    _operator("silu_and_mul(Tensor(a!) out, Tensor input) -> ()", _silu_and_mul)
    _operator(
        "per_token_group_fp8_quant(Tensor input, Tensor(a!) q, Tensor(b!) s, int group_size, float eps, "
        "float fp8_min, float fp8_max, bool ue8m0, bool transposed, bool tma_aligned) -> ()",
        _quantize_fp8_groups,
    )
    _operator(
        "dynamic_per_token_scaled_fp8_quant(Tensor(a!) result, Tensor input, Tensor(b!) scale, "
        "Tensor? scale_ub) -> ()",
        _quantize_fp8_rows,
    )
    _operator(
        "dynamic_scaled_fp8_quant(Tensor(a!) result, Tensor input, Tensor(b!) scale) -> ()",
        _quantize_fp8_tensor,
    )
    _operator(
        "scaled_fp4_quant.out(Tensor input, Tensor input_scale, bool swizzled, *, Tensor(a!) output, "
        "Tensor(b!) output_scale) -> ()",
        _quantize_fp4,
    )


def _operator(schema: str, implementation: Any) -> None:
    _library.define(schema)
    _library.impl(schema.split("(")[0], implementation, "CompositeExplicitAutograd")


def _silu_and_mul(out: torch.Tensor, rows: torch.Tensor) -> None:
    gate, up = rows.float().chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def _quantize_fp8_groups(
    rows: torch.Tensor,
    q: torch.Tensor,
    s: torch.Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    ue8m0: bool,
    *_: object,
) -> None:
    """As in csrc/quantization/w8a8/fp8/per_token_group_quant.cu of vLLM 0.33."""
    groups = rows.float().unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1).clamp(min=eps) / fp8_max
    if ue8m0:
        scale = scale.clamp(min=1e-10).double().log2().ceil().exp2().float()
    s.copy_(scale)
    values = groups * (1 / scale).unsqueeze(-1)
    q.copy_(values.clamp(fp8_min, fp8_max).flatten(-2).to(_FP8))


def _quantize_fp8_rows(q: torch.Tensor, rows: torch.Tensor, s: torch.Tensor, _: object) -> None:
    s.copy_(rows.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / _FP8_MAX)
    q.copy_((rows.float() / s).to(_FP8))


def _quantize_fp8_tensor(q: torch.Tensor, rows: torch.Tensor, s: torch.Tensor) -> None:
    s.copy_(rows.float().abs().amax() / _FP8_MAX)
    q.copy_((rows.float() / s).to(_FP8))


def _quantize_fp4(
    rows: torch.Tensor,
    global_scale: torch.Tensor,
    swizzled: bool,
    *,
    output: torch.Tensor,
    output_scale: torch.Tensor,
) -> None:
    assert not swizzled, "scales of different rows would mix"
    global_scale = global_scale.flatten()[0]  # all that vLLM's kernel reads of it
    blocks = rows.float().unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1) / _FP4_VALUES[-1] * global_scale).to(_FP8)
    output_scale.view(_FP8).copy_(scale)
    values = (blocks * (global_scale / scale.float().clamp(min=1e-10)).unsqueeze(-1)).flatten(-2)
    distances = (values.abs().unsqueeze(-1) - _FP4_VALUES).abs()
    distances[..., ::2] -= 1e-5  # ties go to even codes
    codes = distances.argmin(-1) | (values < 0) * 8
    output.copy_((codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8))
