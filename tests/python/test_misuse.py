"""Bad calls: refused with value, limit and remedy; nothing moves, and the instance goes on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from thread_world import run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig, Handle
from vllm_efa_ep.errors import ConfigurationError

_CONFIG = AllToAllConfig(64, 8, 2, 16, scale_columns=2)


@dataclass(frozen=True)
class Round:
    """What the bad calls are made from."""

    all_to_all: AllToAll
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    scales: torch.Tensor

    def send(self, **changes: Any) -> Handle:
        """Dispatch, with some arguments changed."""
        arguments = {
            "x": self.x,
            "topk_ids": self.ids,
            "topk_weights": self.weights,
            "scales": self.scales,
            **changes,
        }
        return self.all_to_all.dispatch_send(**arguments)

    def finish(self, handle: Handle) -> None:
        """Do the rest of the round and check it: every token goes to experts 0 and 7, which return it."""
        got = self.all_to_all.dispatch_recv(handle)
        assert len(got.x) == 2 * len(self.x)
        assert torch.equal(self.all_to_all.combine(got.x, handle), 2 * self.x)


def _in_a_world(bad_calls: Callable[[Round], None]) -> None:
    """Make bad calls on each of two nodes, then play a good round."""

    def body(all_to_all: AllToAll) -> None:
        tokens = 4
        good = Round(
            all_to_all,
            torch.full((tokens, 64), 1.5, dtype=torch.bfloat16),
            torch.tensor([[0, 7]]).repeat(tokens, 1),
            torch.ones(tokens, 2),
            torch.ones(tokens, 2),
        )
        good.finish(good.send())
        bad_calls(good)
        good.finish(good.send())

    run_world(_CONFIG, 2, settings_of(1), body)


def _moved(all_to_all: AllToAll) -> tuple[int, ...]:
    all_to_all.drain()
    stats = all_to_all.stats()
    return (
        stats.rounds,
        stats.tokens,
        stats.received_rows,
        stats.network_rows,
        stats.peer_rows,
        stats.writes,
    )


def _check_refused(all_to_all: AllToAll, call: Callable[[], object], words: list[str]) -> None:
    before = _moved(all_to_all)
    with pytest.raises(ConfigurationError) as refused:
        call()
    for word in words:
        assert word in str(refused.value)
    assert _moved(all_to_all) == before


def _ones(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


_LONG = torch.int64
_BAD_DISPATCHES = {
    "too many tokens": (
        {
            "x": _ones(17, 64),
            "topk_ids": _ones(17, 2, dtype=_LONG),
            "topk_weights": _ones(17, 2, dtype=torch.float32),
            "scales": _ones(17, 2, dtype=torch.float32),
        },
        ["17 tokens", "max_tokens_per_rank is 16", "send fewer"],
    ),
    "x dtype": ({"x": _ones(4, 64, dtype=torch.float32)}, ["x has dtype torch.float32", "torch.bfloat16"]),
    "x columns": ({"x": _ones(4, 72)}, ["x has shape [4, 72]", "[4, 64]"]),
    "x one-dimensional": ({"x": _ones(4)}, ["x has shape [4]", "[4, 64]"]),
    "x scalar": ({"x": _ones()}, ["x has shape []"]),
    "x device": ({"x": _ones(4, 64, device="meta")}, ["x is on meta", "cpu"]),
    "ids dtype": ({"topk_ids": _ones(4, 2)}, ["topk_ids has dtype torch.bfloat16", "int32 or torch.int64"]),
    "ids shape": ({"topk_ids": _ones(4, 3, dtype=_LONG)}, ["topk_ids has shape [4, 3]", "[4, 2]"]),
    "id too large": ({"topk_ids": torch.tensor([[0, 1]] * 3 + [[7, 8]])}, ["topk_ids[3, 1] is 8", "0 to 7"]),
    "id too small": (
        {"topk_ids": torch.tensor([[0, 1]] * 3 + [[-2, 7]])},
        ["topk_ids[3, 0] is -2", "-1 drops"],
    ),
    "id beyond 32 bits": ({"topk_ids": torch.tensor([[0, 2**32]] * 4)}, ["topk_ids[0, 1] is 4294967296"]),
    "weights dtype": (
        {"topk_weights": _ones(4, 2)},
        ["topk_weights has dtype torch.bfloat16", "torch.float32"],
    ),
    "weights shape": (
        {"topk_weights": _ones(2, 4, dtype=torch.float32)},
        ["topk_weights has shape [2, 4]", "[4, 2]"],
    ),
    "no scales": ({"scales": None}, ["scales are missing", "scale_columns is 2"]),
    "scales shape": ({"scales": _ones(4, 3, dtype=torch.float32)}, ["scales has shape [4, 3]", "[4, 2]"]),
    "channel": ({"channel": 1}, ["channel 1", "use 0 to 0"]),
    "negative channel": ({"channel": -1}, ["channel -1", "use 0 to 0"]),
}


@pytest.mark.parametrize("name", _BAD_DISPATCHES)
def test_a_bad_dispatch_is_refused(name: str) -> None:
    """The next round does not notice."""
    changes, words = _BAD_DISPATCHES[name]
    _in_a_world(lambda good: _check_refused(good.all_to_all, lambda: good.send(**changes), words))


def test_superfluous_scales_are_refused() -> None:
    """They would be dropped in silence."""

    def body(all_to_all: AllToAll) -> None:
        ids, weights = torch.zeros(1, 2, dtype=_LONG), torch.ones(1, 2)
        words = ["scales are given", "scale_columns is 0"]
        _check_refused(
            all_to_all, lambda: all_to_all.dispatch_send(_ones(1, 64), ids, weights, weights), words
        )

    run_world(replace(_CONFIG, scale_columns=0), 1, settings_of(1), body)


def test_a_bad_combine_is_refused() -> None:
    """The round goes on with a good one."""

    def bad_calls(good: Round) -> None:
        all_to_all = good.all_to_all
        handle = good.send()
        rows = all_to_all.dispatch_recv(handle).x
        meta = torch.empty_like(rows, device="meta")
        for output, applied, words in (
            (rows[1:], None, ["expert_output has shape [7, 64]", "[8, 64]"]),
            (rows.float(), None, ["expert_output has dtype torch.float32", "torch.bfloat16"]),
            (rows[:, None].expand(8, 3, 64), None, ["expert_output has shape [8, 3, 64]", "[8, 2, 64]"]),
            (rows[0], None, ["expert_output has shape [64]", "[8, 64]"]),
            (rows, False, ["summed over experts", "[M, K, H]"]),
            (meta, None, ["expert_output is on meta", "cpu"]),
        ):
            call = lambda o=output, a=applied: all_to_all.combine_send(o, handle, a)  # noqa: E731
            _check_refused(all_to_all, call, words)
        all_to_all.combine_send(rows, handle)
        for out, words in (
            (_ones(5, 64), ["out has shape [5, 64]", "[4, 64]"]),
            (_ones(4, 64, dtype=torch.float16), ["out has dtype torch.float16", "torch.bfloat16"]),
            (_ones(4, 64, device="meta"), ["out is on meta", "cpu"]),
            (_ones(64, 4).T, ["out must be contiguous"]),
        ):
            _check_refused(all_to_all, lambda o=out: all_to_all.combine_recv(handle, o), words)
        assert torch.equal(all_to_all.combine_recv(handle), 2 * good.x)

    _in_a_world(bad_calls)


def test_the_place_for_results_comes_after_the_rows() -> None:
    """Before, it would show the results of the round before, which others may still read."""

    def bad_calls(good: Round) -> None:
        all_to_all = good.all_to_all
        handle = good.send()
        words = ["call dispatch_recv first"]
        _check_refused(all_to_all, lambda: all_to_all.expert_output(handle), words)
        _check_refused(all_to_all, lambda: all_to_all.combine_send(_ones(8, 64), handle), words)
        rows = all_to_all.dispatch_recv(handle).x
        output = all_to_all.expert_output(handle)
        assert output.shape == rows.shape
        output.copy_(rows)
        assert torch.equal(all_to_all.combine(output, handle), 2 * good.x)

    _in_a_world(bad_calls)


def test_halves_out_of_turn_are_refused() -> None:
    """Each half of a round once, in order."""

    def bad_calls(good: Round) -> None:
        all_to_all = good.all_to_all
        halves: dict[str, Callable[[], object]] = {
            "dispatch_send": good.send,
            "dispatch_recv": lambda: all_to_all.dispatch_recv(handle),
            "combine_send": lambda: all_to_all.combine_send(rows, handle),
            "combine_recv": lambda: all_to_all.combine_recv(handle),
        }

        def refuse_all_but(turn: str) -> None:
            for name, half in halves.items():
                # The rows of a wrong moment may be refused for their shape first.
                words = ["out of turn", "channel 0"] if name != "combine_send" else []
                if name != turn:
                    _check_refused(all_to_all, half, words)

        handle = good.send()
        rows = _ones(8, 64)
        refuse_all_but("dispatch_recv")
        rows = all_to_all.dispatch_recv(handle).x
        refuse_all_but("combine_send")
        all_to_all.combine_send(rows, handle)
        refuse_all_but("combine_recv")
        all_to_all.combine_recv(handle)
        refuse_all_but("dispatch_send")

    _in_a_world(bad_calls)


def test_foreign_handles_are_refused() -> None:
    """One of an earlier round, and one of a channel that does not exist."""

    def bad_calls(good: Round) -> None:
        all_to_all = good.all_to_all
        old = good.send()
        good.finish(old)
        handle = good.send()
        for wrong, words in (
            (old, [f"of round {old.round}", f"in round {handle.round}", "drop it"]),
            (handle._replace(channel=1), ["channel 1", "use 0 to 0"]),
            (handle._replace(channel=-1), ["channel -1", "use 0 to 0"]),
        ):
            _check_refused(all_to_all, lambda w=wrong: all_to_all.dispatch_recv(w), words)
            _check_refused(all_to_all, lambda w=wrong: all_to_all.combine_send(_ones(8, 64), w), words)
            _check_refused(all_to_all, lambda w=wrong: all_to_all.combine_recv(w), words)
        good.finish(handle)

    _in_a_world(bad_calls)
