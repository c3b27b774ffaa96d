"""``device``: would tensors be on GPUs or in the CPU's memory, and do all parts agree?"""

from vllm_efa_ep.doctor.check import Check, Finding, failed, ok
from vllm_efa_ep.doctor.hardware import nvidia_gpus
from vllm_efa_ep.doctor.system import System


def _examine(system: System) -> Finding:
    gpus = nvidia_gpus(system)
    probe = system.probe("device")
    torch, devices = probe["torch"], probe["devices"]
    facts = {"torch": torch, "vllm-efa-ep": probe["package"]}
    if not gpus:
        return ok(f"no NVIDIA GPU: the CPU device, with torch {torch}", **facts)
    if not probe["cuda_available"]:
        return failed(f"{len(gpus)} NVIDIA GPUs, but torch {torch} cannot use them", **facts)
    if "cuda" not in devices:
        return failed(f"{len(gpus)} NVIDIA GPUs, but this build of vllm-efa-ep has no CUDA device", **facts)
    return ok(f"{len(gpus)} NVIDIA GPUs: the CUDA device, with torch {torch}", **facts)


CHECK = Check(
    name="device",
    why=(
        "A build of torch or of this package without CUDA imports well on a GPU node, and then serves "
        "nothing."
    ),
    fix=(
        "`nvidia-smi` must list the GPUs (in a pod: `nvidia.com/gpu: 8`); `pip install vllm` gives "
        "torch with CUDA; install this package with nvcc on the PATH."
    ),
    examine=_examine,
)
