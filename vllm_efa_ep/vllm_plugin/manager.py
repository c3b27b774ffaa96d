"""The object vLLM keeps for each EP group: it owns the ``AllToAll`` instances of its MoE layers."""

from contextlib import ExitStack, suppress
from typing import Any

import torch
from vllm.distributed.device_communicators.base_device_communicator import All2AllManagerBase
from vllm.distributed.parallel_state import get_pp_group, model_parallel_is_initialized
from vllm.platforms import current_platform

from vllm_efa_ep.all_to_all import AllToAll, AllToAllConfig
from vllm_efa_ep.bootstrap.choice import choose_bootstrap
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import EfaEpError
from vllm_efa_ep.metrics.snapshot import SnapshotWriter
from vllm_efa_ep.vllm_plugin import logger
from vllm_efa_ep.vllm_plugin.error_log import one_line_per_error, use_vllm_log


class EfaEpAll2AllManager(All2AllManagerBase):  # type: ignore[misc]
    """Creates one ``AllToAll`` per distinct configuration and shares it between layers."""

    def __init__(self, cpu_group: Any, fault_tolerance: bool = False) -> None:
        """Remember the EP group; connections are made when the first layer asks for them.

        Args:
            cpu_group: vLLM's gloo group of all EP ranks.
            fault_tolerance: Whether vLLM shall ask ``query_fault`` after each step. On CUDA it is to, anyhow.

        """
        super().__init__(cpu_group)
        # Halves in a replayed CUDA graph cannot raise; vLLM asks only a manager that says it knows faults,
        # and in some configurations none: config_warnings.py names them.
        self.support_fault_tolerance = fault_tolerance or current_platform.is_cuda()
        self._last_mask = torch.zeros(self.world_size, dtype=torch.int32)
        use_vllm_log()
        self._settings = Settings.from_environment()
        self._all_to_alls: dict[AllToAllConfig, AllToAll] = {}
        self._snapshots = SnapshotWriter(
            self._settings.stats_dir, self.rank, lambda: list(self._all_to_alls.values()), _pipeline_stage()
        )

    def get_handle(self, kwargs: dict[str, Any]) -> AllToAll:
        """Return the ``AllToAll`` for these fields of ``AllToAllConfig``; collective when it is new."""
        config = AllToAllConfig(**kwargs)
        if config not in self._all_to_alls:
            with one_line_per_error():
                bootstrap = choose_bootstrap(self.cpu_group, self._settings)
                logger.info("EFA EP: the ranks meet over %s", type(bootstrap).__name__)
                self._all_to_alls[config] = AllToAll(config, bootstrap, self._settings)
            self._log_start(self._all_to_alls[config])
        return self._all_to_alls[config]

    def query_active_mask(self) -> torch.Tensor:
        """Return int32 ``[EP ranks]``: 1 for a rank that is lost, 0 for a live one. Asks no other rank."""
        self._log_faults()
        return self._mask_of_lost()

    def _mask_of_lost(self) -> torch.Tensor:
        mask = torch.zeros(self.world_size, dtype=torch.int32)
        for all_to_all in self._all_to_alls.values():
            mask[list(all_to_all.lost_ranks())] = 1
        return mask

    def query_fault(self) -> torch.Tensor:
        """Return a bool: whether a rank was lost, or a half failed, since the last ``clean_buffers``.

        On CUDA it is read in the current stream, hence after the halves of a step that is still running.
        """
        lost = (self._mask_of_lost() != self._last_mask).any()
        if lost or not self._all_to_alls:
            return lost
        return torch.stack([all_to_all.fault() for all_to_all in self._all_to_alls.values()]).any()

    def clean_buffers(self) -> None:
        """Go on with the live ranks, who all call it: new memory and connections for every ``AllToAll``.

        Raises:
            RankExcludedError: The others have gone on without this rank.
            EfaEpError: As for ``AllToAll.mask``.

        """
        for all_to_all in self._all_to_alls.values():
            with one_line_per_error():
                all_to_all.mask()
        self._last_mask = self._mask_of_lost()

    def max_sms_used(self) -> int:
        """Return 0: micro-batches share a stream, and no half occupies the GPU while data flies.

        So there is nothing that vLLM should leave SMs for when two micro-batches overlap.
        """
        return 0

    def close(self) -> None:
        """Write the last counters and close all connections; safe to repeat."""
        with ExitStack() as closing:  # one that fails must not leave the others open
            closing.callback(self._all_to_alls.clear)
            for all_to_all in reversed(self._all_to_alls.values()):
                closing.callback(all_to_all.close)
            self._snapshots.close()

    def destroy(self) -> None:
        """Close; the name by which vLLM's CUDA communicator calls it."""
        self.close()

    def _log_faults(self) -> None:
        """Log what vLLM's own error for a fault does not say: the half, the round, and who was waited for."""
        for all_to_all in self._all_to_alls.values():
            with suppress(EfaEpError), one_line_per_error():
                all_to_all.raise_fault()

    def _log_start(self, all_to_all: AllToAll) -> None:
        stats = all_to_all.stats()
        logger.info(
            "EFA EP rank %d of %d on %d node(s): provider %s, fabric %s, %s layout, %.1f MiB",
            stats.rank,
            stats.world_size,
            stats.nodes,
            stats.provider or "none (one node)",
            stats.fabric or "none (one node)",
            all_to_all.config.layout,
            all_to_all.memory_plan().total / 2**20,
        )


def _pipeline_stage() -> int:
    """Return this rank's; each stage has an EP group of its own, which counts its ranks from 0."""
    return int(get_pp_group().rank_in_group) if model_parallel_is_initialized() else 0
