"""What compiled code takes at a glance is what the checks in Python would take; the rest is left to them.

The oracle is ``DispatchInput``, and torch's own slices.
"""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from thread_world import run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig, _core, argument_checks, dispatch_input, dispatched
from vllm_efa_ep.argument_checks import EXCHANGE, glance
from vllm_efa_ep.dispatch_input import DispatchInput, dispatch_glance
from vllm_efa_ep.errors import ConfigurationError

_CPU = torch.device("cpu")
_CONFIG = AllToAllConfig(64, 4, 2, 8, device="cpu")
_SCALED = replace(_CONFIG, dtype=torch.float8_e4m3fn, scale_columns=1)


def _rows(count: int, columns: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(count, columns, dtype=dtype)


def _inputs(**changes: Any) -> dict[str, Any]:
    """Return five tokens, as they should be but for the changes."""
    inputs: dict[str, Any] = {
        "x": _rows(5),
        "topk_ids": torch.zeros(5, 2, dtype=torch.int32),
        "topk_weights": torch.zeros(5, 2),
        "scales": None,
        "count": None,
    }
    return inputs | changes


# 8 rows in memory with gaps between them, as activations() has them.
_IN_PLACE = torch.zeros(8, 72, dtype=torch.bfloat16)[:, :64]

_TAKEN = {
    "usual": _inputs(),
    "long ids": _inputs(topk_ids=torch.zeros(5, 2, dtype=torch.int64)),
    "count": _inputs(count=torch.tensor([3], dtype=torch.int32)),
    "one token": _inputs(
        x=_rows(1), topk_ids=torch.zeros(1, 2, dtype=torch.int32), topk_weights=torch.ones(1, 2)
    ),
    "in place": _inputs(x=_IN_PLACE[:5]),
}
_LEFT = {
    "no token": _inputs(
        x=_rows(0), topk_ids=torch.zeros(0, 2, dtype=torch.int32), topk_weights=torch.zeros(0, 2)
    ),
    "dtype of x": _inputs(x=_rows(5, dtype=torch.float16)),
    "columns of x": _inputs(x=_rows(5, 32)),
    "dimensions of x": _inputs(x=torch.zeros(64, dtype=torch.bfloat16)),
    "x with gaps": _inputs(x=_rows(5, 80)[:, :64]),
    "x at an odd address": _inputs(x=torch.zeros(5 * 64 + 1, dtype=torch.bfloat16)[1:].view(5, 64)),
    "later rows in place": _inputs(x=_IN_PLACE[2:7]),
    "every second row in place": _inputs(
        x=_IN_PLACE[::2], topk_ids=torch.zeros(4, 2, dtype=torch.int32), topk_weights=torch.zeros(4, 2)
    ),
    "dtype of ids": _inputs(topk_ids=torch.zeros(5, 2, dtype=torch.int16)),
    "rows of ids": _inputs(topk_ids=torch.zeros(4, 2, dtype=torch.int32)),
    "columns of ids": _inputs(topk_ids=torch.zeros(5, 3, dtype=torch.int32)),
    "ids with gaps": _inputs(topk_ids=torch.zeros(5, 4, dtype=torch.int32)[:, :2]),
    "dimensions of ids": _inputs(topk_ids=torch.zeros(5, dtype=torch.int32)),
    "dtype of weights": _inputs(topk_weights=torch.zeros(5, 2, dtype=torch.float64)),
    "rows of weights": _inputs(topk_weights=torch.zeros(6, 2)),
    "scales not wanted": _inputs(scales=torch.zeros(5, 1)),
    "length of count": _inputs(count=torch.zeros(2, dtype=torch.int32)),
    "dtype of count": _inputs(count=torch.tensor([3])),
    "count is a number": _inputs(count=3),
    "device of ids": _inputs(topk_ids=torch.zeros(5, 2, dtype=torch.int32, device="meta")),
    "x is a list": _inputs(x=[0.0]),
}


@pytest.mark.parametrize("in_place", [None, _IN_PLACE], ids=["elsewhere", "activations"])
@pytest.mark.parametrize("name", [*_TAKEN])
def test_what_is_taken_is_read_as_by_the_checks(name: str, in_place: torch.Tensor | None) -> None:
    """Address by address; rows of ``activations()`` are only ordinary rows with gaps elsewhere."""
    inputs = _TAKEN[name]
    read = dispatch_glance(_CONFIG, _CPU, in_place).read(**inputs)
    if name == "in place" and in_place is None:
        assert read is None
        return
    expected = DispatchInput.of(_CONFIG, _CPU, in_place, **inputs).arguments()
    if name == "one token":  # the stride of a single row says nothing
        assert read is not None
        read, expected = (*read[:1], *read[2:]), (*expected[:1], *expected[2:])
    assert read == expected


@pytest.mark.parametrize("name", [*_LEFT])
def test_what_needs_a_copy_or_an_error_is_left(name: str) -> None:
    """Both with and without a place where rows may stay."""
    for in_place in (None, _IN_PLACE):
        assert dispatch_glance(_CONFIG, _CPU, in_place).read(**_LEFT[name]) is None


def test_scales_are_read() -> None:
    """Where there are some, they must come, one row per token."""
    reader = dispatch_glance(_SCALED, _CPU, None)
    inputs = _inputs(x=_rows(5, dtype=torch.float8_e4m3fn), scales=torch.ones(5, 1))
    assert reader.read(**inputs) == DispatchInput.of(_SCALED, _CPU, None, **inputs).arguments()
    for wrong in (None, torch.ones(5, 2), torch.ones(5, 1, dtype=torch.float64)):
        assert reader.read(**(inputs | {"scales": wrong})) is None


def test_an_address_is_that_of_such_a_tensor_only() -> None:
    """Dtype, device, shape, order and address must be right; 0 otherwise."""
    results = glance(torch.bfloat16, _CPU)
    table = _rows(6)
    assert results.address(table, (6, 64)) == table.data_ptr()
    assert results.address(table.view(3, 2, 64), (3, 2, 64)) == table.data_ptr()
    assert results.address(table[:1], (1, 64)) == table.data_ptr()
    odd = torch.zeros(65, dtype=torch.bfloat16)[1:].view(1, 64)
    for wrong, shape in [
        (table, (5, 64)),
        (table, (6, 1, 64)),
        (table.float(), (6, 64)),
        (table[:, :32], (6, 32)),
        (table.t(), (64, 6)),
        (table.to("meta"), (6, 64)),
        (odd, (1, 64)),
        (None, (6, 64)),
    ]:
        assert results.address(wrong, shape) == 0


@pytest.mark.parametrize("exchange", [EXCHANGE, None], ids=["exchange", "without"])
def test_views_are_the_first_rows(exchange: object) -> None:
    """Of every table, without a copy, and they keep the memory when the tables are gone."""
    tables = [torch.arange(24.0).view(6, 4), torch.arange(12, dtype=torch.int32).view(6, 2)]
    expected = [table.clone() for table in tables]
    views = _core.RowViews(exchange, tables)
    for rows in (0, 1, 4, 6):
        made = views.first(rows)
        for view, table in zip(made, tables, strict=True):
            assert torch.equal(view, table[:rows])
            assert view.dtype == table.dtype
            assert rows == 0 or view.data_ptr() == table.data_ptr()
    kept = views.first(5)
    del views, made, view, table
    tables.clear()
    gc.collect()
    assert all(torch.equal(view, table[:5]) for view, table in zip(kept, expected, strict=True))


def test_without_the_exchange_all_is_checked_at_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of torch have none; the rounds are the same, and so are the errors."""
    for module in (argument_checks, dispatch_input, dispatched):
        monkeypatch.setattr(module, "EXCHANGE", None)
    assert dispatch_glance(_CONFIG, _CPU, None).read(**_TAKEN["usual"]) is None
    assert glance(torch.bfloat16, _CPU).address(_rows(2), (2, 64)) == 0

    def body(all_to_all: AllToAll) -> None:
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        ids = torch.tensor([[0, 1], [1, 2], [3, 0]])
        got, handle = all_to_all.dispatch(x, ids, torch.ones(3, 2))
        assert torch.equal(got.x, x)
        assert torch.equal(all_to_all.combine(got.x.clone(), handle), x)
        with pytest.raises(ConfigurationError, match="shape"):
            all_to_all.dispatch(x, ids[:2], torch.ones(3, 2))

    run_world(_CONFIG, 1, settings_of(1), body)
