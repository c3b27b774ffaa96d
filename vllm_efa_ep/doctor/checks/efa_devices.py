"""``efa-devices``: are there EFA devices, as many as the instance has, and of a generation that can write?"""

from vllm_efa_ep.doctor.check import Check, Finding, failed, ok, warning
from vllm_efa_ep.doctor.hardware import efa_devices, meant_instead_of_efa
from vllm_efa_ep.doctor.instances import INSTANCES, instance_type
from vllm_efa_ep.doctor.system import System

# RDMA write came with Nitro v4; p4d's devices (0xefa0) only read. "Supported instance types" in
# https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/efa.html
_WITHOUT_RDMA_WRITE = "0xefa0"


def _examine(system: System) -> Finding:
    devices = efa_devices(system)
    instance = instance_type(system)
    where = f"{instance} has" if instance else "this machine has"
    if meant := meant_instead_of_efa(system):
        return ok(f"{where} no EFA device: rows between nodes travel over TCP, as {meant} asks")
    if not devices:
        if instance in INSTANCES:
            return failed(f"{where} no EFA device attached; it can have {INSTANCES[instance].nics}")
        return warning(f"{where} no EFA device: rows between nodes would travel over TCP")
    generations = sorted({device.device_id for device in devices})
    found = f"{where} {len(devices)} EFA devices of generation {', '.join(generations)}"
    facts = {"EFA devices": f"{len(devices)} of {', '.join(generations)}"}
    if _WITHOUT_RDMA_WRITE in generations:
        return failed(f"{found}; {_WITHOUT_RDMA_WRITE} has no RDMA write", **facts)
    if instance in INSTANCES and len(devices) != INSTANCES[instance].nics:
        return failed(f"{found}, not {INSTANCES[instance].nics}", **facts)
    return ok(found, **facts)


CHECK = Check(
    name="efa-devices",
    why="Rows travel between nodes as RDMA writes of EFA devices; each GPU drives its share of them.",
    fix=(
        "Launch p5, p5e, p5en or p6 instances with an EFA interface on every network card that takes one: "
        "`efaEnabled: true` of an eksctl node group (examples/eks), `Efa: {Enabled: true}` of a "
        "ParallelCluster compute resource (examples/parallelcluster). Without EFA, set "
        "EFA_EP_PROVIDER=tcp to say that TCP is meant."
    ),
    examine=_examine,
)
