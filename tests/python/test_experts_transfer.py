"""Expert weights between processes over NIXL: bit for bit, and what is said when they cannot come."""

import signal
import threading
from pathlib import Path

import pytest
import torch
from process_world import ProcessWorld, Rank, run_processes
from thread_world import DEADLINE_S, Rendezvous, ThreadBootstrap, run_ranks

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import (
    ConfigurationError,
    ExpertTransferError,
    FabricUnavailableError,
    RankTimeoutError,
)
from vllm_efa_ep.experts_plan import EMPTY, Move, plan_moves
from vllm_efa_ep.experts_transfer import ExpertTransfer
from vllm_efa_ep.nixl_agent import NixlAgent, choose_backend

pytest.importorskip("nixl", reason="needs NIXL: pip install 'vllm-efa-ep[nixl]'")

_LAYER = "layer 3"
_SETTINGS = Settings(timeout_s=DEADLINE_S / 2)
_SLOTS = 4


def _weights(experts: list[int]) -> dict[str, torch.Tensor]:
    """Weights of three types and odd sizes that only depend on the expert; empty slots hold zeros."""
    made = {
        "w13": torch.zeros(len(experts), 70, 33, dtype=torch.bfloat16),
        "w2": torch.zeros(len(experts), 33, 35, dtype=torch.float32),
        "w13_scale": torch.zeros(len(experts), 5, dtype=torch.uint8),
    }
    for slot, expert in enumerate(experts):
        if expert != EMPTY:
            generator = torch.Generator().manual_seed(expert)
            for tensor in made.values():
                values = torch.randint(1, 200, tensor.shape[1:], generator=generator)
                tensor[slot] = values.to(tensor.dtype)
    # As vLLM keeps some scales: transposed, but without gaps.
    made["w2_scale"] = torch.arange(len(experts) * 6.0).reshape(len(experts), 2, 3).transpose(1, 2)
    for slot, expert in enumerate(experts):
        made["w2_scale"][slot] = expert
    return made


def _empty() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in _weights([EMPTY] * _SLOTS).items()}


def _local(placement: list[int], rank: int) -> list[int]:
    return placement[rank * _SLOTS : (rank + 1) * _SLOTS]


def _rebalance(rank: Rank, old: list[int], new: list[int]) -> int:
    """Go from one map to the other as a caller would, and compare every byte."""
    bootstrap, own = rank.bootstrap, rank.bootstrap.rank
    weights, staging = _weights(_local(old, own)), _empty()
    with ExpertTransfer(bootstrap, _SETTINGS) as transfer:
        transfer.offer({_LAYER: weights})
        moves = plan_moves(old, new, bootstrap.world_size)[own]
        pulled = transfer.pull_together(_LAYER, moves, staging)
        for move in moves:
            for name, tensor in weights.items():
                tensor[move.slot] = staging[name][move.slot]
        wanted = _weights(_local(new, own))
        for name, tensor in weights.items():
            for slot, expert in enumerate(_local(new, own)):
                if expert != EMPTY:
                    assert torch.equal(tensor[slot], wanted[name][slot]), f"{name} of expert {expert}"
        bootstrap.all_gather(b"compared")
        return pulled.bytes


def test_a_rebalancing_between_processes() -> None:
    """Three ranks swap and copy experts; each fetches only what it has not, and can do it again."""
    old = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, EMPTY]
    new = [0, 4, 8, 1, 4, 5, 0, 9, 2, 3, 6, 7]
    per_slot = sum(tensor[0].nbytes for tensor in _empty().values())
    remote = [
        sum(move.source != rank for move in moves) for rank, moves in enumerate(plan_moves(old, new, 3))
    ]
    assert run_processes(3, _rebalance, old, new) == [count * per_slot for count in remote]


def _outlive(rank: Rank) -> list[str]:
    """Rank 2 ends after offering; rank 0 fetches from it in vain, then from rank 1, which has copies."""
    bootstrap, own = rank.bootstrap, rank.bootstrap.rank
    placement = [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 8, 9]
    with ExpertTransfer(bootstrap, _SETTINGS) as transfer:
        transfer.offer({_LAYER: _weights(_local(placement, own))})
        bootstrap.all_gather(b"offered")
        staging = _empty()
        if own == 0:  # connected before the end, as ranks are
            transfer.pull(_LAYER, [Move(8, 2, 2, 0)], staging)
        rank.tell("offered")
        if own != 0:
            threading.Event().wait()
        rank.await_go()
        messages = []
        for _ in range(2):
            with pytest.raises(ExpertTransferError) as failed:
                transfer.pull(_LAYER, [Move(4, 2, 0, 1), Move(8, 2, 2, 2)], staging)
            assert (failed.value.rank, failed.value.experts) == (2, (4, 8))
            messages.append(str(failed.value))
        wanted = placement[:2] + [4, 5] + placement[4:8] + [EMPTY] * 4
        moves = plan_moves(placement, wanted, 3, lost={2})[0]
        transfer.pull(_LAYER, moves, staging)
        expected = _weights([EMPTY, EMPTY, 4, 5])
        for name, tensor in staging.items():
            assert torch.equal(tensor[2:], expected[name][2:])
        return messages


def test_a_dead_source_is_named_and_its_copies_serve() -> None:
    """SIGKILL: the weights of a lost rank come from the rank that has copies."""
    with ProcessWorld(3, _outlive) as world:
        for rank in range(3):
            world.hear(rank, "offered")
        world.signal(2, signal.SIGKILL)
        world.go(0)
        ended = world.ended(0)
        assert ended.error is None, ended.message
        assert all("rank 2 did not deliver the weights of expert 4, 8" in message for message in ended.value)


def _rehost(rank: Rank) -> None:
    """Rank 2 is lost; the others share its experts, of which each has some copies, among them."""
    bootstrap, own = rank.bootstrap, rank.bootstrap.rank
    old = [0, 1, 8, 9, 4, 5, 10, 11, 8, 9, 10, 11]
    new = [0, 8, 10, 1, 4, 11, 9, 5, *[EMPTY] * _SLOTS]
    weights, staging = _weights(_local(old, own)), _empty()
    with ExpertTransfer(bootstrap, _SETTINGS) as transfer:
        transfer.offer({_LAYER: weights})
        bootstrap.all_gather(b"offered")
        rank.tell("offered")
        rank.await_go()
        moves = plan_moves(old, new, 3, lost={2})[own]
        with pytest.raises(ConfigurationError, match="pass a step that was never used before"):
            transfer.pull_together(_LAYER, moves, staging, survivors=(0, 1))
        transfer.pull_together(_LAYER, moves, staging, survivors=(0, 1), step="generation 2")
        wanted = _weights(_local(new, own))
        for name, tensor in weights.items():
            for move in moves:
                tensor[move.slot] = staging[name][move.slot]
            assert torch.equal(tensor, wanted[name]), name


def test_survivors_share_the_experts_of_a_lost_rank() -> None:
    """Without the process group, which still waits for it."""
    with ProcessWorld(3, _rehost) as world:
        for rank in range(3):
            world.hear(rank, "offered")
        world.signal(2, signal.SIGKILL)
        for rank in (0, 1):
            world.go(rank)
        for rank in (0, 1):
            ended = world.ended(rank)
            assert ended.error is None, ended.message


def _stalled(rank: Rank) -> str:
    bootstrap, own = rank.bootstrap, rank.bootstrap.rank
    with ExpertTransfer(bootstrap, _SETTINGS) as transfer:
        transfer.offer({_LAYER: _weights(_local(list(range(8)), own))})
        bootstrap.all_gather(b"offered")
        rank.tell("offered")
        rank.await_go()
        with pytest.raises(RankTimeoutError) as failed:
            transfer.pull(_LAYER, [Move(5, 1, 1, 0)], _empty(), timeout_s=0.5)
        assert failed.value.missing == (1,)
        return str(failed.value)


def test_a_frozen_source_is_named_in_time() -> None:
    """SIGSTOP before it was ever connected to: nobody answers, and the deadline ends the wait."""
    with ProcessWorld(2, _stalled) as world:
        for rank in range(2):
            world.hear(rank, "offered")
        world.signal(1, signal.SIGSTOP)
        world.go(0)
        ended = world.ended(0)
        assert ended.error is None, ended.message
        assert "did not arrive within 0.5 s from rank 1 for experts (5,); 0 of" in ended.value


def test_a_call_that_never_returns_ends_at_the_deadline() -> None:
    """As NIXL's LIBFABRIC posting to a dead peer: the caller gets an error that names it, close() returns."""
    hold = threading.Event()

    def body(bootstrap: ThreadBootstrap) -> str:
        with ExpertTransfer(bootstrap, _SETTINGS) as transfer:
            transfer.offer({_LAYER: _weights([0, 1, 2, 3])})
            bootstrap.all_gather(b"offered")
            message = ""
            if bootstrap.rank == 0:
                transfer.pull(_LAYER, [Move(2, 1, 2, 0)], _empty())  # connects
                transfer._agent._nixl.transfer = lambda _: hold.wait()
                transfer._agent._timeout_s = 0.5  # of close()
                with pytest.raises(ExpertTransferError) as failed:
                    transfer.pull(_LAYER, [Move(2, 1, 2, 0)], _empty(), timeout_s=0.5)
                message = str(failed.value)
                with pytest.raises(FabricUnavailableError, match="build a new ExpertTransfer"):
                    transfer.pull(_LAYER, [Move(2, 1, 2, 0)], _empty())
            bootstrap.all_gather(b"tried")
        return message

    message, _ = run_ranks(2, body)
    hold.set()
    assert message.startswith("rank 1 did not deliver the weights of expert 2 (NIXL has not come back")


def _fail_alone(rank: Rank) -> str:
    own = rank.bootstrap.rank
    with ExpertTransfer(rank.bootstrap, _SETTINGS) as transfer:
        transfer.offer({_LAYER: _weights([0, 1, 2, 3])})
        moves = [Move(0, 1 - own, 9 if own == 1 else 0, 0)]
        with pytest.raises((ConfigurationError, ExpertTransferError)) as failed:
            transfer.pull_together(_LAYER, moves, _empty())
        rank.bootstrap.all_gather(b"compared")
        return f"{type(failed.value).__name__}: {failed.value}"


def test_nobody_goes_on_when_one_rank_fails() -> None:
    """pull_together: the rank that failed knows why, the other knows who."""
    other, own = run_processes(2, _fail_alone)
    assert own.startswith("ConfigurationError: expert 0 of layer 3: w13 has no slot 9 at rank 0; it has 4")
    assert other.startswith("ExpertTransferError: rank 1 could not get its experts: expert 0 of layer 3")


def _alone(size: int = 1) -> Bootstrap:
    return ThreadBootstrap(Rendezvous(size), 0)


def test_what_a_rank_has_is_copied() -> None:
    """Without the network."""
    weights, staging = _weights([5, 6, 7, 8]), _empty()
    with ExpertTransfer(_alone(), _SETTINGS) as transfer:
        transfer.offer({_LAYER: weights})
        assert transfer.pull(_LAYER, [Move(7, 0, 2, 0)], staging).bytes == 0
    for name, tensor in staging.items():
        assert torch.equal(tensor[0], weights[name][2])


def test_a_closed_transfer_says_so_at_once() -> None:
    """Not that NIXL is stuck, after a deadline. Closing twice is fine."""
    weights, staging = _weights([5, 6, 7, 8]), _empty()
    with ExpertTransfer(_alone(), _SETTINGS) as transfer:
        transfer.offer({_LAYER: weights})
    transfer.close()
    for call in (
        lambda: transfer.offer({_LAYER: weights}),
        lambda: transfer.pull(_LAYER, [Move(7, 0, 2, 0)], staging),
    ):
        with pytest.raises(ConfigurationError, match="this ExpertTransfer is closed; build a new one"):
            call()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("w13", torch.zeros(4, 70, 32, dtype=torch.bfloat16), r"shape \(70, 33\) per slot, but \(70, 32\)"),
        (
            "w13",
            torch.zeros(4, 70, 33, dtype=torch.float16),
            "dtype torch.bfloat16 per slot, but torch.float16",
        ),
        ("w2_scale", torch.zeros(4, 3, 2), r"stride \(1, 3\) per slot, but \(2, 1\)"),
        ("w2", torch.zeros(4, 33, 70)[:, :, ::2], "has gaps inside a slot"),
        ("w2", torch.zeros(1, 33, 35).expand(4, 33, 35), "has slots that overlap"),
        ("w2", torch.tensor(1.0), "is a single number"),
        ("w4", torch.zeros(4, 2), r"\['w13', 'w13_scale', 'w2', 'w2_scale'\], but \["),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, tensor: torch.Tensor, message: str) -> None:
    """With the names, and both sides of the difference; nothing is written."""
    staging = _empty()
    with ExpertTransfer(_alone(), _SETTINGS) as transfer:
        transfer.offer({_LAYER: _weights([1, 2, 3, 4])})
        with pytest.raises(ConfigurationError, match=message):
            transfer.pull(_LAYER, [Move(1, 0, 0, 0)], {**staging, name: tensor})
    assert not staging["w13_scale"].any()


def test_a_layer_that_nobody_offers_and_a_rank_that_is_not() -> None:
    """Both end in time, and name the rank and the expert."""
    with ExpertTransfer(_alone(2), _SETTINGS) as transfer:
        with pytest.raises(
            RankTimeoutError, match=r"rank 1 has not offered layer 3 within 0\.1 s, .* expert 6"
        ):
            transfer.pull(_LAYER, [Move(6, 1, 0, 0)], _empty(), timeout_s=0.1)
        with pytest.raises(ConfigurationError, match="expert 6 is to come from rank 2, but ranks are 0 to 1"):
            transfer.pull(_LAYER, [Move(6, 2, 0, 0)], _empty())


def test_the_plug_in_follows_the_devices(tmp_path: Path) -> None:
    """A host with an EFA device, one with another, one without; a setting wins."""
    assert choose_backend("auto", tmp_path) == "UCX"
    for device, driver in (("mlx5_0", "mlx5_core"), ("rdmap0s6", "efa")):
        (tmp_path / "drivers" / driver).mkdir(parents=True)
        (tmp_path / "class" / device / "device").mkdir(parents=True)
        (tmp_path / "class" / device / "device" / "driver").symlink_to(tmp_path / "drivers" / driver)
        assert choose_backend("auto", tmp_path / "class") == ("LIBFABRIC" if driver == "efa" else "UCX")
    assert choose_backend("UCX", tmp_path / "class") == "UCX"


def test_a_plug_in_that_cannot_be_loaded_is_an_error() -> None:
    """Like LIBFABRIC on a machine without CUDA: no silent change to another one."""
    with pytest.raises(FabricUnavailableError, match="NIXL cannot load its plug-in NONESUCH"):
        NixlAgent("agent", "NONESUCH", DEADLINE_S)
