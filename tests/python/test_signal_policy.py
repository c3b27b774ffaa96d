"""Rounds under every signal policy: the same result, and each policy's fences and signal requests."""

import pytest
import torch
from thread_world import Meeting, run_ranks, run_world, settings_of

from vllm_efa_ep import AllToAll, AllToAllConfig, Stats
from vllm_efa_ep.errors import ConfigurationError

_SIZE, _TOKENS, _ROUNDS = 3, 4, 3
_CONFIG = AllToAllConfig(64, 6, 2, 16)


def _run(policy: str) -> list[tuple[torch.Tensor, Stats]]:
    """Return every rank's last result and counters after some rounds of one rank per node."""
    meeting = Meeting(_SIZE)

    def body(all_to_all: AllToAll) -> tuple[torch.Tensor, Stats]:
        rank = all_to_all.rank
        x = torch.arange(_TOKENS * 64, dtype=torch.bfloat16).reshape(_TOKENS, 64) + rank
        ids = (torch.arange(_TOKENS * 2).reshape(_TOKENS, 2) * 3 + rank) % 6
        for _ in range(_ROUNDS):
            got, handle = all_to_all.dispatch(x, ids, torch.ones(ids.shape))
            out = all_to_all.combine(got.x * 2, handle)
        meeting.wait()
        all_to_all.drain()
        return out, all_to_all.stats()

    return run_world(_CONFIG, _SIZE, settings_of(1, signal_policy=policy, chunk_bytes=200), body)


@pytest.mark.parametrize("policy", ["coupled", "decoupled"])
def test_a_round_does_not_depend_on_the_policy(policy: str) -> None:
    """Every write is signalled by a request of its own; those of pairs with rows are fenced."""
    for (want, counted), (got, stats) in zip(_run("counted"), _run(policy), strict=True):
        assert torch.equal(want, got)
        assert stats.writes == counted.writes
        assert stats.bytes_written == counted.bytes_written
        assert counted.fences == counted.fence_waits == counted.signal_requests == counted.stall_ns == 0
        assert 0 < stats.fence_waits <= stats.fences <= stats.signal_requests == stats.writes
        assert (stats.stall_ns > 0) == (policy == "coupled")


def test_nic_ordered_is_refused_without_fences() -> None:
    """The error names policy, provider and remedy."""

    def build(bootstrap: object) -> None:
        AllToAll(_CONFIG, bootstrap, settings_of(1, signal_policy="nic_ordered"))  # type: ignore[arg-type]

    with pytest.raises(ConfigurationError) as refused:
        run_ranks(2, build)
    for word in ("nic_ordered", "provider", "EFA_EP_SIGNAL_POLICY=counted"):
        assert word in str(refused.value)
