"""A Ray cluster with one node per host, closed to everybody who does not have its token."""

import contextlib
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from network import Host
from programs import HERE, Program, environment_on

PORT = 6379
START_SECONDS = 300


@dataclass(frozen=True)
class RayCluster:
    """A running cluster; the first host is its head.

    Attributes:
        hosts: Its hosts.
        settings: The environment that its nodes and drivers share.
        directory: Where Ray keeps its sockets and logs.

    """

    hosts: Sequence[Host]
    settings: Mapping[str, str]
    directory: Path

    def start_node(self, host: Host, own_settings: Mapping[str, str] | None = None) -> None:
        """Run ``ray start`` on a host, with one place for a rank; two CPUs are what vLLM's engine needs."""
        resources = ["--num-cpus", "2", "--num-gpus", "1", "--object-store-memory", "80000000"]
        role = (
            ["--head", "--port", str(PORT), "--include-dashboard=false", "--temp-dir", str(self.directory)]
            if host is self.hosts[0]
            else ["--address", f"{self.hosts[0].address}:{PORT}"]
        )
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "start", "--disable-usage-stats", "--node-ip-address", host.address]
        # To a file: Ray's daemons inherit the output, so a pipe would never end.
        log = self.directory / f"start-{host.index}.log"
        with log.open("wb") as output:
            status = subprocess.run(
                host.command([*command, *resources, *role]),
                env=environment_on(host, {**self.settings, **(own_settings or {})}),
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=START_SECONDS,
            ).returncode
        assert status == 0, log.read_text(errors="replace")

    def driver(self, log: Path, *arguments: str) -> Program:
        """Start ``ray_driver.py`` on the first host."""
        return Program(
            self.hosts[0], [sys.executable, str(HERE / "ray_driver.py"), *arguments], log, self.settings
        )


@contextlib.contextmanager
def ray_cluster(
    hosts: Sequence[Host],
    settings: Mapping[str, str] | None = None,
    own_settings: Mapping[int, Mapping[str, str]] | None = None,
) -> Iterator[RayCluster]:
    """Run ``ray start`` on every host; afterwards end everything that runs there.

    Args:
        hosts: The first is the head.
        settings: Environment variables of all nodes and drivers.
        own_settings: Those that only one node has, by its host's number.

    """
    # A short path: that of a Unix socket may not be longer than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        environment = {
            "RAY_ADDRESS": f"{hosts[0].address}:{PORT}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "SHARED_DIRECTORY": directory,
            # How often Ray looks whether a node is there: five times in vain, and it is lost. Default: 3000.
            "RAY_health_check_period_ms": "500",
            **(settings or {}),
        }
        cluster = RayCluster(hosts, environment, Path(directory))
        # One after the other: nodes share this machine's files, and started at once they hinder each other.
        try:
            for host in hosts:
                cluster.start_node(host, (own_settings or {}).get(host.index))
            yield cluster
        finally:
            for host in hosts:  # before the directory, into which they write
                host.kill_processes()
