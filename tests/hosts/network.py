"""Hosts for tests: network namespaces of this machine, each with an address of its own, joined by a switch.

The switch is a bridge in a namespace of its own, so nothing appears in the machine's own network, several
networks may exist at once, and removing the namespaces removes everything. Namespaces share the machine's
files, shared memory and process ids; ``host_identity`` of the package tells them apart, as it must.
"""

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import psutil

INTERFACE = "eth0"
_ENDED_SECONDS = 10.0


@cache
def why_impossible() -> str:
    """Return why this machine cannot make network namespaces, empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"efaep-probe-{secrets.token_hex(4)}"
    try:
        _ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", b"") or b""
        return f"this machine cannot make network namespaces: {error} {output.decode().strip()}"
    _ip("netns", "del", name)
    return ""


@dataclass(frozen=True)
class Host:
    """One namespace.

    Attributes:
        index: Its number, from 0.
        namespace: Its name for ``ip netns``.
        address: Its IPv4 address on ``INTERFACE``.
        switch: The namespace of the switch.

    """

    index: int
    namespace: str
    address: str
    switch: str

    def command(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs ``command`` inside."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def environment(self) -> dict[str, str]:
        """Return by which address and interface gloo, vLLM and Ray shall know the host."""
        return {
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "VLLM_HOST_IP": self.address,
            "RAY_NODE_IP_ADDRESS": self.address,
        }

    def cut(self) -> None:
        """Take the link down at the switch, as a pulled cable: no packet passes, and nobody is told."""
        _ip("-n", self.switch, "link", "set", f"port{self.index}", "down")

    def mend(self) -> None:
        """Undo ``cut``."""
        _ip("-n", self.switch, "link", "set", f"port{self.index}", "up")

    def kill_processes(self) -> None:
        """End everything that runs on the host."""
        _kill_processes(self.namespace)

    def process_ids(self) -> list[int]:
        """Return the processes that live in the namespace."""
        return [int(each) for each in _ip("netns", "pids", self.namespace).split()]


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Make ``count`` hosts that reach each other; afterwards end what runs in them and remove them."""
    run = secrets.token_hex(3)
    switch = f"efaep-{run}-switch"
    made: list[Host] = []
    with contextlib.ExitStack() as cleanup:
        _add_namespace(switch, cleanup)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for index in range(count):
            host = Host(index, f"efaep-{run}-{index}", f"10.77.0.{10 + index}", switch)
            _add_namespace(host.namespace, cleanup)
            port = f"port{index}"
            _ip(
                *("-n", switch, "link", "add", port, "type", "veth"),
                *("peer", "name", INTERFACE, "netns", host.namespace),
            )
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip("-n", host.namespace, "link", "set", INTERFACE, "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            made.append(host)
        yield made


def _add_namespace(name: str, cleanup: contextlib.ExitStack) -> None:
    _ip("netns", "add", name)
    cleanup.callback(_remove_namespace, name)


def _remove_namespace(name: str) -> None:
    """End what runs inside, whoever started it, then remove the namespace and its end of the cable."""
    _kill_processes(name)
    _ip("netns", "del", name)


def _kill_processes(namespace: str) -> None:
    ended = []
    for process_id in map(int, _ip("netns", "pids", namespace).split()):
        with contextlib.suppress(psutil.NoSuchProcess):
            ended.append(psutil.Process(process_id))
            ended[-1].kill()
    psutil.wait_procs(ended, timeout=_ENDED_SECONDS)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
