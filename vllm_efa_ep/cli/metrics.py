"""``vllm-efa-ep metrics``: every metric, and an exporter for nodes without an API server."""

import argparse
import signal
import sys
from pathlib import Path

from vllm_efa_ep.errors import ConfigurationError
from vllm_efa_ep.metrics.registry import METRICS, metrics_markdown

NAME = "metrics"
HELP = "list every metric, or serve those of this node"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--markdown", action="store_true", help="as the table of docs/metrics.md")
    parser.add_argument(
        "--port",
        type=int,
        help="serve the metrics of this node's ranks on this port until interrupted: for nodes that run "
        "`vllm serve --headless`, which have no /metrics; needs EFA_EP_STATS_DIR, as the ranks have it",
    )
    parser.add_argument("--address", default="0.0.0.0", help="where --port listens (default: everywhere)")


def run(options: argparse.Namespace) -> int:
    """List or serve.

    Raises:
        ConfigurationError: There is nothing to serve from, the port is taken, or the extra is missing.

    """
    if options.port is not None:
        return _serve(options.address, options.port)
    text = "".join(f"{each.sample_names[0]} ({each.kind})\n    {each.meaning}\n" for each in METRICS)
    sys.stdout.write(metrics_markdown() if options.markdown else text)
    return 0


def _serve(address: str, port: int) -> int:
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise ConfigurationError(
            f"--port needs prometheus_client ({error}); `pip install 'vllm-efa-ep[metrics]'`"
        ) from error
    from vllm_efa_ep.config import Settings
    from vllm_efa_ep.metrics.collector import RankCollector

    directory = Settings.from_environment().stats_dir
    if not directory:
        raise ConfigurationError(
            "EFA_EP_STATS_DIR is not set: start `vllm serve` and this command with the same directory"
        )
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # before the server's threads, which inherit it
    registry = CollectorRegistry()
    registry.register(RankCollector(Path(directory)))
    try:
        server, _ = start_http_server(port, address, registry)
    except (OSError, OverflowError) as error:  # OverflowError: no port has that number
        raise ConfigurationError(f"cannot serve on {address}:{port}: {error}") from error
    print(f"serving {directory} on http://{address}:{server.server_port}/metrics", flush=True)
    try:
        signal.sigwait(ends)
    finally:
        server.shutdown()
    return 0
