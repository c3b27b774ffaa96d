"""Which devices this package and torch can use."""

import json
import os
from importlib.metadata import version
from typing import Any

import torch

from vllm_efa_ep import _core


def probe() -> dict[str, Any]:
    """Ask both."""
    # Ray hides the GPUs from whoever has none reserved, but the question is what the host has.
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        del os.environ["CUDA_VISIBLE_DEVICES"]
    return {
        "package": version("vllm-efa-ep"),
        "devices": ["cpu", *(["cuda"] if getattr(_core, "cuda_architectures", "") else [])],
        "torch": torch.__version__,
        "cuda_available": torch.cuda.is_available(),
    }


if __name__ == "__main__":
    print(json.dumps(probe()))
