"""Builds `xrl._C` with CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, and puts the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        # A cache from a deleted build environment names tools that are gone: start afresh.
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        options = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-Dpybind11_DIR={_pybind11_dir()}",
            # AUTO builds the CUDA kernels where there is an nvcc; ON insists, OFF leaves them out.
            f"-DXRL_WITH_CUDA={os.environ.get('XRL_WITH_CUDA', 'AUTO')}",
            # For `make test-sanitized`.
            f"-DXRL_SANITIZE={os.environ.get('XRL_SANITIZE', '')}",
        ]
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *generator, *options], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)


def _pybind11_dir() -> str:
    import pybind11

    return str(pybind11.get_cmake_dir())


setup(ext_modules=[Extension("xrl._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
