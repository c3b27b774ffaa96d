"""The end of a world: nobody takes memory away that another rank still uses."""

import time
from collections.abc import Sequence

from vllm_efa_ep.bootstrap import Bootstrap
from vllm_efa_ep.errors import EfaEpError, RankLostError, RankTimeoutError
from vllm_efa_ep.watch import CheckWait


def wait_for_all(bootstrap: Bootstrap, ranks: Sequence[int], timeout_s: float, check: CheckWait) -> None:
    """Wait until every rank closes.

    Args:
        bootstrap: Through which ranks say so.
        ranks: The live ranks.
        timeout_s: Longest wait, in seconds.
        check: Raises ``RankLostError`` if a rank is gone; takes half, round and a description of the wait.

    Raises:
        RankLostError: A rank is gone, so it will not close.
        RankTimeoutError: A rank did not close in time.

    """
    start = time.monotonic()
    who = f"close on rank {bootstrap.rank}"
    try:
        bootstrap.publish(f"closed/{bootstrap.rank}", "1")
        for rank in ranks:
            while bootstrap.lookup(f"closed/{rank}") is None:
                waited = time.monotonic() - start
                wait = f"{who} waited {waited:f} s for rank {rank}"
                check("close", 0, wait)
                if waited > timeout_s:
                    raise RankTimeoutError(wait, "close", 0, (rank,))
                time.sleep(0.001)
    except (RankLostError, RankTimeoutError):
        raise
    except EfaEpError:
        # The process that hosts the bootstrap has left already, so it passed this point, or it is gone.
        check("close", 0, f"{who} waited for all ranks")
