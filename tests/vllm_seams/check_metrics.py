"""Check that vLLM's /metrics has our metrics once one of our backends is configured.

    python check_metrics.py

With PROMETHEUS_MULTIPROC_DIR in the environment, as vLLM sets it for several API servers, and without. A
process of its own for each, because prometheus_client chooses between the two when it is imported.
"""

import os

from vllm_efa_ep.vllm_plugin import register


def scrape() -> str:
    """Return what vLLM's own route answers."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router

    app = FastAPI()
    attach_router(app)
    return TestClient(app).get("/metrics").text


def main() -> None:
    """Configure a server as ``vllm serve`` does, and scrape."""
    register()
    from vllm.config import ParallelConfig, VllmConfig

    VllmConfig(parallel_config=ParallelConfig(all2all_backend="allgather_reducescatter"))
    assert "EFA_EP_STATS_DIR" not in os.environ, "other backends get a directory for nothing"
    assert "efa_ep_" not in scrape()
    for _ in range(2):  # a second configuration must not show anything twice
        VllmConfig(parallel_config=ParallelConfig(all2all_backend="efa_ep_low_latency"))
    directory = os.environ["EFA_EP_STATS_DIR"]
    text = scrape()
    assert text.count("# TYPE efa_ep_rounds_total counter") == 1
    print(directory)


if __name__ == "__main__":
    main()
