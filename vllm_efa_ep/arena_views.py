"""Parts of a rank's arena as tensors, for those who want to write where other ranks read."""

import torch

from vllm_efa_ep import _core
from vllm_efa_ep.all_to_all_config import AllToAllConfig
from vllm_efa_ep.connection import Connection


def results(
    connection: Connection, layout: _core.Layout, channel: int, config: AllToAllConfig
) -> torch.Tensor:
    """Return the place for expert outputs, ``[world * max_tokens, H]`` of the combine dtype.

    The tensor keeps the arena mapped.
    """
    size = layout.result_rows * layout.combine_row_bytes
    view = connection.memory.tensor(connection.arena, layout.results_offset(channel), size)
    return view.view(config.combine_dtype).view(layout.result_rows, config.hidden_size)


def activations(
    connection: Connection, layout: _core.Layout, channel: int, config: AllToAllConfig
) -> torch.Tensor:
    """Return the place for tokens to dispatch, ``[max_tokens, columns]`` of the dispatch dtype.

    The rows are part of longer ones, hence not contiguous. The tensor keeps the arena mapped.
    """
    rows, itemsize = config.max_tokens_per_rank, config.dtype.itemsize
    used = (rows - 1) * layout.dispatch_row_bytes + config.columns * itemsize
    view = connection.memory.tensor(connection.arena, layout.activations_offset(channel), used)
    return view.view(config.dtype).as_strided(
        (rows, config.columns), (layout.dispatch_row_bytes // itemsize, 1)
    )
