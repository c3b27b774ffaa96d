"""Which libfabric, provider and NICs a rank that has the whole host would use."""

import json
from typing import Any

from vllm_efa_ep.config import Settings
from vllm_efa_ep.doctor.cluster.link import Endpoint
from vllm_efa_ep.errors import EfaEpError


def probe() -> dict[str, Any]:
    """Open it and tell what it turned out to be."""
    try:
        return Endpoint(Settings.from_environment(), interface="", peers=1).description
    except EfaEpError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    print(json.dumps(probe()))
