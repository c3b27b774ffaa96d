"""The hosts of these tests: reachable, cut off and reachable again, and gone without trace."""

import subprocess
import sys

import psutil
import pytest
from network import Host, hosts

_LISTEN = """
import socket, sys
server = socket.create_server((sys.argv[1], 7))
print(flush=True)
server.accept(), server.accept()
"""
_CALL = "import socket, sys; socket.create_connection((sys.argv[1], 7), float(sys.argv[2]))"
# A link that comes up again takes a moment, and so does a busy machine; one that is down stays down.
_UP_SECONDS, _DOWN_SECONDS = 60.0, 0.5


def _listen(host: Host) -> None:
    """Start to accept two connections."""
    command = host.command([sys.executable, "-c", _LISTEN, host.address])
    listener = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert listener.stdout is not None
    assert listener.stdout.readline()


def _reaches(one: Host, other: Host, seconds: float = _UP_SECONDS) -> bool:
    command = one.command([sys.executable, "-c", _CALL, other.address, str(seconds)])
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def test_hosts_reach_each_other_until_one_is_cut_off() -> None:
    """Cutting one off does not touch the others."""
    with hosts(3) as (first, second, third):
        _listen(first)
        _listen(third)
        assert _reaches(second, first)
        third.cut()
        assert _reaches(second, first)
        assert not _reaches(second, third, _DOWN_SECONDS)
        third.mend()
        assert _reaches(second, third)


def _fail_with_a_process_running(seen: list[Host | psutil.Process]) -> None:
    with hosts(2) as (host, other):
        subprocess.Popen(host.command(["sleep", "600"]))
        while not (inside := host.process_ids()):
            pass
        seen += [host, other, psutil.Process(inside[0])]
        raise RuntimeError("the test failed")


def test_nothing_stays_behind_after_a_failure() -> None:
    """Neither processes nor namespaces."""
    seen: list[Host | psutil.Process] = []
    with pytest.raises(RuntimeError, match="the test failed"):
        _fail_with_a_process_running(seen)
    namespaces = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    for each in seen:
        if isinstance(each, Host):
            assert each.namespace not in namespaces
            assert each.switch not in namespaces
        else:
            assert not each.is_running()
