"""``nvlink``: does every GPU reach every other GPU of the node over NVLink?"""

import re

from vllm_efa_ep.doctor.check import Check, Finding, failed, not_applicable, ok
from vllm_efa_ep.doctor.hardware import nvidia_gpus
from vllm_efa_ep.doctor.system import System


def _examine(system: System) -> Finding:
    if len(nvidia_gpus(system)) < 2:
        return not_applicable("fewer than two NVIDIA GPUs")
    fabric = system.run("nvidia-smi", "--query-gpu=index,fabric.state", "--format=csv,noheader")
    matrix = system.run("nvidia-smi", "topo", "-p2p", "n")
    if fabric is None or matrix is None:
        return failed("there is no nvidia-smi")
    for printed in (fabric, matrix):
        if printed.status != 0:
            return failed(f"nvidia-smi failed: {printed.text.strip()}")
    waiting = [line for line in fabric.text.splitlines() if "In Progress" in line or "Not Started" in line]
    if waiting:
        return failed(f"the NVSwitch fabric is not up: {'; '.join(waiting)} (GPU, state)")
    rows = [line.split() for line in matrix.text.splitlines() if re.match(r"\s*GPU\d+\s+(X|[A-Z]+)\s", line)]
    apart = [row[0] for row in rows if any(state not in ("X", "OK") for state in row[1:])]
    if not rows or apart:
        return failed(f"no NVLink to all others: {', '.join(apart) or 'nvidia-smi shows no GPU'}")
    return ok(f"all {len(rows)} GPUs reach each other")


CHECK = Check(
    name="nvlink",
    why="Inside a node the ranks read and write each other's memory over NVLink.",
    fix=(
        "`sudo systemctl restart nvidia-fabricmanager`, then `nvidia-smi topo -p2p n`; if the state "
        'stays "In Progress", replace the node. In containers let all GPUs of the node be visible: '
        "`nvidia.com/gpu: 8`."
    ),
    examine=_examine,
)
