"""Counters of a rank at rest."""

from thread_world import DEADLINE_S

from vllm_efa_ep import AllToAll, Stats


def settled(all_to_all: AllToAll) -> Stats:
    """Return the counters once all writes of the halves so far are complete.

    A half returns when its own part is done, and the proxy posts and counts in its own time: what a test
    reads at once depends on how the threads happened to run.
    """
    all_to_all._generations.current().connection.drain(DEADLINE_S, lambda *_: None)
    return all_to_all.stats()
