"""The version of vLLM, and what in it does not look as the plugin expects."""

import json
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_efa_ep.vllm_plugin import seams


def probe() -> dict[str, Any]:
    """Compare every seam of this platform."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        return {"version": None}
    wanted = os.environ.get("VLLM_PLUGINS")
    return {
        "version": found,
        "plugin": wanted is None or "efa_ep" in wanted.split(","),
        "problems": seams.problems(seams.platform_seams()),
    }


if __name__ == "__main__":
    print(json.dumps(probe()))
