"""The vLLM plugin: expert-parallel backends ``efa_ep_high_throughput`` and ``efa_ep_low_latency``.

This package is the only place that imports vLLM. vLLM calls ``register`` in each of its processes,
before it builds its configuration; with our backends not selected, vLLM behaves as without the plugin.
"""

import logging

logger = logging.getLogger("vllm.efa_ep")

_registered = False


def register() -> None:
    """Make our backends known to vLLM; the entry point of the group ``vllm.general_plugins``.

    Never raises, since an exception here would end every vLLM process of the environment. What is wrong
    (a malformed setting, an unsupported vLLM) is raised later, if one of our backends is selected.
    """
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from vllm_efa_ep.vllm_plugin import config_patches

        config_patches.apply()
    except Exception:
        logger.exception("vllm-efa-ep could not be registered; its backends are not available")
