"""Builds the extension module ``vllm_efa_ep._core`` with CMake; everything else is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent / "csrc"
# nanobind supports Python's stable ABI from 3.12 on: one wheel then serves every later Python.
STABLE_ABI = sys.version_info >= (3, 12)


class CMakeBuild(build_ext):
    """Configures and builds ``csrc`` and installs the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        """Run CMake with Ninja, both from the build requirements."""
        import cmake

        cmake_program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_directory = Path(self.build_temp).resolve()
        build_directory.mkdir(parents=True, exist_ok=True)
        configure = [
            *(cmake_program, "-S", SOURCE, "-B", build_directory, "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),  # e.g. -DEFA_EP_CUDA_ARCHITECTURES="80;90a"
            f"-DCMAKE_INSTALL_PREFIX={destination.parent}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(
            [cmake_program, "--build", build_directory, "--target", "_core", "_core_stub"], check=True
        )
        subprocess.run([cmake_program, "--install", build_directory], check=True)
        if self.editable_mode:  # setuptools copies the module into the source tree, but not its type stub
            shutil.copy(destination / "_core.pyi", SOURCE.parent / "vllm_efa_ep")


setup(
    ext_modules=[Extension("vllm_efa_ep._core", sources=[], py_limited_api=STABLE_ABI)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp312"}} if STABLE_ABI else {},
)
