"""Parts of a rank's arena as tensors, for those who want to write where other ranks read."""

import torch
from torch.utils.dlpack import from_dlpack

from vllm_efa_ep import _core
from vllm_efa_ep.all_to_all_config import AllToAllConfig


def results(arena: _core.Arena, layout: _core.Layout, channel: int, config: AllToAllConfig) -> torch.Tensor:
    """Return the place for expert outputs, ``[world * max_tokens, H]`` of the combine dtype.

    The tensor keeps the arena mapped.
    """
    view = arena.view(layout.results_offset(channel), layout.result_rows * layout.combine_row_bytes)
    return from_dlpack(view).view(config.combine_dtype).view(layout.result_rows, config.hidden_size)


def activations(
    arena: _core.Arena, layout: _core.Layout, channel: int, config: AllToAllConfig
) -> torch.Tensor:
    """Return the place for tokens to dispatch, ``[max_tokens, columns]`` of the dispatch dtype.

    The rows are part of longer ones, hence not contiguous. The tensor keeps the arena mapped.
    """
    rows, itemsize = config.max_tokens_per_rank, config.dtype.itemsize
    used = (rows - 1) * layout.dispatch_row_bytes + config.columns * itemsize
    view = from_dlpack(arena.view(layout.activations_offset(channel), used)).view(config.dtype)
    return view.as_strided((rows, config.columns), (layout.dispatch_row_bytes // itemsize, 1))
