"""``settings``: are the EFA_EP_* variables what they should be?"""

from vllm_efa_ep.config import Settings
from vllm_efa_ep.doctor.check import Check, Finding, failed, ok
from vllm_efa_ep.doctor.system import System
from vllm_efa_ep.errors import ConfigurationError


def _examine(system: System) -> Finding:
    names = sorted(name for name in system.environment if name.startswith("EFA_EP_"))
    try:
        Settings.from_environment(system.environment)
    except ConfigurationError as error:
        return failed(str(error))
    values = ", ".join(f"{name}={system.environment[name]}" for name in names)
    return ok(values or "all settings have their defaults", settings=values)


CHECK = Check(
    name="settings",
    why=("A misspelt or malformed setting would otherwise show at the first request, on one of many nodes."),
    fix=(
        "`vllm-efa-ep settings` lists every setting with its values; unset or correct the one that is named."
    ),
    examine=_examine,
)
