"""Finds the module that csrc/testing/emulated_bindings.cpp builds: worlds on an emulated network."""

import functools
import importlib.util
import os
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


@functools.cache
def emulated() -> ModuleType:
    """Return the module; EMULATED_MODULE_PATH says where it is, if not where the Makefile builds it."""
    directory = Path(os.environ.get("EMULATED_MODULE_PATH", ROOT / "build" / "cpp-plain" / "testing"))
    files = sorted(directory.glob("_emulated.*.so"))
    if not files:
        raise FileNotFoundError(
            f"no _emulated module in {directory}; build it with `make test-cpp`, or set EMULATED_MODULE_PATH "
            "to <build directory>/testing"
        )
    spec = importlib.util.spec_from_file_location("_emulated", files[0])
    if spec is None or spec.loader is None:
        raise ImportError(f"{files[0]} is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
