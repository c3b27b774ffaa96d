"""``shared-memory``: is /dev/shm large enough for vLLM, NCCL and Ray?"""

from vllm_efa_ep.doctor.check import Check, Finding, ok, warning
from vllm_efa_ep.doctor.system import System

_ENOUGH = 1 << 30


def _examine(system: System) -> Finding:
    printed = system.run("df", "--output=size", "--block-size=1", "/dev/shm")
    lines = printed.text.split() if printed is not None and printed.status == 0 else []
    if not lines or not lines[-1].isdigit():
        return warning("/dev/shm is not mounted")
    size = int(lines[-1])
    found = f"/dev/shm has {size / 2**30:.1f} GiB"
    return ok(found) if size >= _ENOUGH else warning(found)


CHECK = Check(
    name="shared-memory",
    why=(
        "vLLM, NCCL and Ray pass data between the processes of a node through /dev/shm, of which a "
        "container has 64 MiB by default. Our own arenas are anonymous and need none of it."
    ),
    fix=(
        "Kubernetes: a volume `emptyDir: {medium: Memory, sizeLimit: 64Gi}` mounted at /dev/shm. "
        "Docker: `--shm-size 64g` or `--ipc host`."
    ),
    examine=_examine,
)
