"""The sources build as a user builds them: an sdist, wheels, and again in a tree that was built before."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_SOURCES = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", "work_dir"
)


def run(*command: str, folder: Path, **variables: str) -> str:
    # CUDA is compiled, and looked at, in tests/kernels/test_cuda_build.py.
    environment = os.environ | {"XRL_WITH_CUDA": "OFF"} | variables
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, f"{command}:\n{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}"
    return finished.stdout


@pytest.mark.slow
def test_sdist_builds_wheels_again_and_again_and_the_module_in_them_loads(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(ROOT, sources, ignore=NOT_SOURCES)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), folder=sources)
    (archive,) = tmp_path.glob("xrl-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "sdist", filter="data")
    (tree,) = (tmp_path / "sdist").iterdir()

    listings = []
    for number in ("first", "second"):
        # The tools of the first build, CMake's generator among them, are gone with their environment at the second.
        run(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / number), folder=tree)
        assert list(tree.glob("build/**/CMakeCache.txt"))
        (wheel,) = (tmp_path / number).glob("xrl-*.whl")
        with zipfile.ZipFile(wheel) as contents:
            listings.append(sorted(contents.namelist()))
            contents.extractall(tmp_path / f"{number}-unpacked")
    assert listings[0] == listings[1]
    unpacked = tmp_path / "second-unpacked"
    # Without torch, so with no version of it, and without a driver.
    found = run(
        sys.executable,
        "-c",
        "import importlib.util, sys, glob\n"
        "spec = importlib.util.spec_from_file_location('xrl._C', glob.glob('xrl/_C*.so')[0])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.cpu_isa(), module.cuda_built())",
        folder=unpacked,
    )
    assert found.split()[0] in ("scalar", "avx2", "avx512") and found.split()[1] == "False"
