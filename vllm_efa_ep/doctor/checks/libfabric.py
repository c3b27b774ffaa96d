"""``libfabric``: which libfabric would be opened, and is it new enough for the devices?"""

import re

from vllm_efa_ep.doctor.check import Check, Finding, failed, ok, warning
from vllm_efa_ep.doctor.hardware import efa_devices, version_tuple
from vllm_efa_ep.doctor.system import System

_AWS = "/opt/amazon/efa/"
# https://github.com/ofiwg/libfabric/releases: 1.18 writes by RDMA on EFA, 2.1 has the fabric efa-direct.
_RDMA_WRITE = (1, 18)
_EFA_DIRECT = (2, 1)


def _examine(system: System) -> Finding:
    probe = system.probe("fabric")
    library = probe.get("library", "")
    if not library:
        return failed(probe["error"])
    path, _, version = library.partition(" ")
    version = version.split(",")[0]
    found = f"libfabric {version} ({path})"
    facts = {"libfabric": version}
    if not efa_devices(system):
        return ok(found, **facts)
    number = version_tuple(re.sub(r"^\D*", "", version))
    if number < _RDMA_WRITE:
        return failed(f"{found} emulates RDMA writes on EFA; 1.18 is the first that does not", **facts)
    if number < _EFA_DIRECT:
        return warning(f"{found} has no fabric efa-direct; 2.1 is the first that has", **facts)
    if not path.startswith(_AWS):
        return warning(f"{found} is not AWS's build in {_AWS}", **facts)
    return ok(found, **facts)


CHECK = Check(
    name="libfabric",
    why=(
        "libfabric is the way to EFA. AWS's build comes with the EFA installer and has the newest "
        "provider; distributions ship old ones."
    ),
    fix=(
        "Install the EFA installer's user space (in an image: `./efa_installer.sh -y --skip-kmod "
        "--skip-limit-conf --no-verify`), or name another library: "
        "`EFA_EP_LIBFABRIC=/path/to/libfabric.so.1`. Without EFA: `apt-get install libfabric1`."
    ),
    examine=_examine,
)
