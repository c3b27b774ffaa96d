"""The object vLLM keeps for each EP group: it owns the ``AllToAll`` instances of its MoE layers."""

from contextlib import suppress
from typing import Any

from vllm.distributed.device_communicators.base_device_communicator import All2AllManagerBase

from vllm_efa_ep.all_to_all import AllToAll, AllToAllConfig
from vllm_efa_ep.bootstrap.choice import choose_bootstrap
from vllm_efa_ep.config import Settings
from vllm_efa_ep.errors import EfaEpError
from vllm_efa_ep.vllm_plugin import logger
from vllm_efa_ep.vllm_plugin.error_log import one_line_per_error, use_vllm_log
from vllm_efa_ep.vllm_plugin.stats_file import StatsFile


class EfaEpAll2AllManager(All2AllManagerBase):  # type: ignore[misc]
    """Creates one ``AllToAll`` per distinct configuration and shares it between layers."""

    def __init__(self, cpu_group: Any) -> None:
        """Remember the EP group; connections are made when the first layer asks for them.

        Args:
            cpu_group: vLLM's gloo group of all EP ranks.

        """
        super().__init__(cpu_group)
        use_vllm_log()
        self._settings = Settings.from_environment()
        self._all_to_alls: dict[AllToAllConfig, AllToAll] = {}
        self.stats_file = StatsFile(self._settings.stats_dir, self.rank, self._all_to_alls.values())

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

    def close(self) -> None:
        """Write the last counters and close all connections; safe to repeat."""
        with suppress(EfaEpError):  # an instance that failed has no counters any more
            self.stats_file.write()
        for all_to_all in self._all_to_alls.values():
            all_to_all.close()
        self._all_to_alls.clear()

    def destroy(self) -> None:
        """Close; the name by which vLLM's CUDA communicator calls it."""
        self.close()

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
