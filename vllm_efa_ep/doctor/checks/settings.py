"""``settings``: are the EFA_EP_* variables what they should be?"""

from collections.abc import Mapping
from pathlib import Path

from vllm_efa_ep.bootstrap.run import read_secret
from vllm_efa_ep.config import SETTINGS, Settings
from vllm_efa_ep.doctor.check import Check, Finding, failed, ok
from vllm_efa_ep.doctor.system import System
from vllm_efa_ep.errors import ConfigurationError


def _examine(system: System) -> Finding:
    try:
        settings = Settings.from_environment(system.environment)
        if settings.token_file:
            secret = Path(settings.token_file)
            # A relative one is where the command was started, as for a rank.
            read_secret(system.path(str(secret)) if secret.is_absolute() else secret, "EFA_EP_TOKEN_FILE")
    except ConfigurationError as error:
        return failed(str(error))
    given = {name: value for name, value in system.environment.items() if name.startswith("EFA_EP_")}
    own = {setting.variable for setting in SETTINGS if setting.of_one_host}
    common = {name: value for name, value in given.items() if name not in own}
    return ok(_listed(given) or "all settings have their defaults", settings=_listed(common))


def _listed(variables: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(variables.items()))


CHECK = Check(
    name="settings",
    why=("A misspelt or malformed setting would otherwise show at the first request, on one of many nodes."),
    fix=(
        "`vllm-efa-ep settings` lists every setting with its values; unset or correct the one that is named."
    ),
    examine=_examine,
)
