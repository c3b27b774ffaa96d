"""Checks of tensors that a caller passes.

Every half makes some, so compiled code has a glance first; what is as it should be is not looked at again.
"""

import torch

from vllm_efa_ep import _core
from vllm_efa_ep.errors import ConfigurationError

# Of rows, which kernels read and write that many bytes at a time.
ALIGNMENT = _core.ROW_ALIGNMENT
# How compiled code looks at tensors; torch has it since 2.10. Without it, a glance takes nothing.
EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def glance(dtype: torch.dtype, device: torch.device) -> _core.TensorGlance:
    """Return what knows contiguous, aligned tensors of a dtype and device from others."""
    return _core.TensorGlance(EXCHANGE, torch.empty(0, dtype=dtype, device=device))


def checked(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> torch.Tensor:
    """Return the tensor, contiguous, if ``check`` has nothing to say."""
    check(name, tensor, shape, dtypes, device)
    return tensor.contiguous()


def check(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise ``ConfigurationError``, with the remedy, if shape, dtype or device are wrong."""
    if tensor.device == device and tensor.dtype in dtypes and tensor.shape == shape:
        return
    if tensor.device != device:
        raise ConfigurationError(
            f"{name} is on {tensor.device}, but this instance runs on {device}; move it there with .to()"
        )
    if tensor.dtype not in dtypes:
        accepted = " or ".join(map(str, dtypes))
        raise ConfigurationError(f"{name} has dtype {tensor.dtype}; convert it to {accepted}")
    raise ConfigurationError(f"{name} has shape {list(tensor.shape)}; pass {list(shape)}")


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy if it is not contiguous or not at a multiple of ``ALIGNMENT``."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
