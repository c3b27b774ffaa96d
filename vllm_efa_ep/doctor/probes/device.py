"""Which devices this package and torch can use."""

import json
from importlib.metadata import version
from typing import Any

import torch

from vllm_efa_ep import _core


def probe() -> dict[str, Any]:
    """Ask both."""
    return {
        "package": version("vllm-efa-ep"),
        "devices": ["cpu", *(["cuda"] if hasattr(_core, "CudaDevice") else [])],
        "torch": torch.__version__,
        "cuda_available": torch.cuda.is_available(),
    }


if __name__ == "__main__":
    print(json.dumps(probe()))
