"""Hosts for tests: network namespaces of this machine, each with an address of its own, joined by a switch.

The switch is a namespace of its own with a bridge per network, so nothing appears in the machine's own
network, several switches may exist at once, and removing the namespaces removes everything. Namespaces share
the machine's files, shared memory and process ids; ``host_identity`` of the package tells them apart, as it
must.
"""

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import psutil

INTERFACE, DATA_INTERFACE = "eth0", "eth1"
_SUBNETS = {INTERFACE: "10.77.0", DATA_INTERFACE: "10.77.1"}
_ENDED_SECONDS = 60.0


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

    def cut(self, interface: str = INTERFACE) -> None:
        """Take a link down at the switch, as a pulled cable: no packet passes, and nobody is told."""
        _ip("-n", self.switch, "link", "set", _port(interface, self.index), "down")

    def mend(self, interface: str = INTERFACE) -> None:
        """Undo ``cut``."""
        _ip("-n", self.switch, "link", "set", _port(interface, self.index), "up")

    def kill_processes(self) -> None:
        """End everything that runs on the host."""
        _kill_processes(self.namespace)

    def process_ids(self) -> list[int]:
        """Return the processes that live in the namespace."""
        return [int(each) for each in _ip("netns", "pids", self.namespace).split()]


@contextlib.contextmanager
def hosts(count: int, interfaces: Sequence[str] = (INTERFACE,)) -> Iterator[list[Host]]:
    """Make hosts that reach each other; afterwards end what runs in them and remove them.

    Args:
        count: How many.
        interfaces: Of each; the second, if any, is ``DATA_INTERFACE``, on a network of its own.

    """
    run = secrets.token_hex(3)
    switch = f"efaep-{run}-switch"
    made: list[Host] = []
    with contextlib.ExitStack() as cleanup:
        _add_namespace(switch, cleanup)
        for interface in interfaces:
            _ip("-n", switch, "link", "add", f"bridge-{interface}", "type", "bridge")
            _ip("-n", switch, "link", "set", f"bridge-{interface}", "up")
        for index in range(count):
            host = Host(index, f"efaep-{run}-{index}", f"{_SUBNETS[INTERFACE]}.{10 + index}", switch)
            _add_namespace(host.namespace, cleanup)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            for interface in interfaces:
                _plug_in(host, interface)
            made.append(host)
        yield made


def _plug_in(host: Host, interface: str) -> None:
    port, address = _port(interface, host.index), f"{_SUBNETS[interface]}.{10 + host.index}/24"
    inside, switch = ("-n", host.namespace), ("-n", host.switch)
    _ip(*switch, "link", "add", port, "type", "veth", "peer", "name", interface, "netns", host.namespace)
    _ip(*switch, "link", "set", port, "master", f"bridge-{interface}", "up")
    _ip(*inside, "addr", "add", address, "dev", interface)
    _ip(*inside, "link", "set", interface, "up")


def _port(interface: str, index: int) -> str:
    return f"{interface}-{index}"


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
