"""``provider``: which libfabric provider and fabric would carry the rows?"""

from vllm_efa_ep.doctor.check import Check, Finding, failed, ok, warning
from vllm_efa_ep.doctor.hardware import efa_devices, meant_instead_of_efa
from vllm_efa_ep.doctor.system import System


def _examine(system: System) -> Finding:
    probe = system.probe("fabric")
    if "error" in probe:
        return failed(probe["error"])
    provider, fabric, nics = probe["provider"], probe["fabric"], probe["nics"]
    facts = {"provider": f"{provider} {fabric}" if provider == "efa" else provider}
    found = f"provider {provider}, fabric {fabric}, NICs {', '.join(nics)}"
    if provider != "efa":
        if efa_devices(system):
            return failed(f"{found}: the EFA devices of this machine would not be used", **facts)
        if meant := meant_instead_of_efa(system):
            return ok(f"{found}, as {meant} asks", **facts)
        return warning(f"{found}: for trying and for development, not for speed", **facts)
    if fabric != "efa-direct":
        return warning(f"{found}: the slower of EFA's two fabrics", **facts)
    return ok(found, **facts)


CHECK = Check(
    name="provider",
    why=(
        "`efa-direct` hands every write straight to the device; `efa` puts a software protocol in "
        "between; `tcp` on a machine with EFA is tens of times slower and looks the same from "
        "outside."
    ),
    fix=(
        "Without EFA devices: that of efa-devices. With them: `unset EFA_EP_PROVIDER FI_PROVIDER`, mend "
        "what `vllm-efa-ep doctor` says of efa-driver, efa-access, memlock and libfabric, and look at "
        "`/opt/amazon/efa/bin/fi_info -p efa`."
    ),
    examine=_examine,
)
