"""What AWS's EFA instances with GPUs are made of.

Sources: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/efa.html and
https://docs.aws.amazon.com/ec2/latest/instancetypes/ac.html; the number of EFA devices is the number of EFA
network cards, and is what Kubernetes counts as ``vpc.amazonaws.com/efa``.
"""

from dataclasses import dataclass

from vllm_efa_ep.doctor.system import System


@dataclass(frozen=True)
class Instance:
    """An instance type.

    Attributes:
        gpus: Number of GPUs.
        nics: Number of EFA devices.
        gigabits: Rate of each of them, Gb/s.

    """

    gpus: int
    nics: int
    gigabits: int


INSTANCES = {
    "p5.48xlarge": Instance(8, 32, 100),
    "p5e.48xlarge": Instance(8, 32, 100),
    "p5en.48xlarge": Instance(8, 16, 200),
    "p6-b200.48xlarge": Instance(8, 8, 400),
    "p6-b300.48xlarge": Instance(8, 16, 400),
}


def instance_type(system: System) -> str:
    """Return the EC2 instance type, which Nitro puts into the DMI table, or an empty string elsewhere."""
    if system.read("/sys/class/dmi/id/sys_vendor") != "Amazon EC2":
        return ""
    return system.read("/sys/class/dmi/id/product_name") or ""
