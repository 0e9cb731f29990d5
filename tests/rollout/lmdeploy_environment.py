"""An environment of its own for LMDeploy: the pinned wheel without what it depends on, made once, kept in a cache.

torch, transformers and the like come from the environment of the tests, so that nothing big is downloaded. The compiled
modules of the wheel (400 MB, and they need CUDA) are taken out: tests/rollout/turbomind_stand_in has others.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "turbomind_stand_in"
# Set where a test must not be left out for want of a network.
NEED_NETWORK = "XRL_TESTS_NEED_NETWORK"
# What `import lmdeploy.turbomind` wants and the tests' environment lacks, with what that wants in turn.
PACKAGES = (
    "mmengine-lite==0.10.7",
    "addict==2.4.0",
    "yapf==0.43.0",
    "termcolor",
    "pybase64",
    "shortuuid",
    "requests",
    "charset-normalizer",
    "urllib3",
    "certifi",
)
# How pip says that it cannot reach the index.
NO_NETWORK = (
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeoutError",
    "ProxyError",
)


def lmdeploy_python(version: str) -> Path:
    """The interpreter of an environment with that LMDeploy; skips the test where the package index is out of reach."""
    ours = sysconfig.get_path("purelib")
    key = hashlib.sha256(repr((version, PACKAGES, sys.version, ours)).encode()).hexdigest()[:12]
    folder = _cache() / f"lmdeploy-{version}-{key}"
    with (_cache() / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not folder.is_dir():
            _build(folder, version, ours)
    return folder / "bin" / "python"


def environment() -> dict[str, str]:
    """For a process of that interpreter: xrl and the stand-in can be imported."""
    return {"PYTHONPATH": os.pathsep.join([str(STAND_IN), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xrl-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _build(folder: Path, version: str, ours: str) -> None:
    shutil.rmtree(unfinished := folder.with_suffix(".unfinished"), ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(unfinished)], check=True)
    (packages,) = unfinished.glob("lib/python*/site-packages")
    install = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--retries=1"]
        + [f"--target={packages}", f"lmdeploy=={version}", *PACKAGES],
        capture_output=True,
        text=True,
    )
    if install.returncode != 0:
        shutil.rmtree(unfinished)
        if any(words in install.stderr for words in NO_NETWORK) and NEED_NETWORK not in os.environ:
            pytest.skip(f"lmdeploy {version} cannot be installed, the package index is out of reach")
        pytest.fail(f"lmdeploy {version} cannot be installed: {install.stderr}")
    for compiled in (packages / "lmdeploy" / "lib").glob("*.so"):
        compiled.unlink()
    (packages / "tests_environment.pth").write_text(ours + "\n")
    unfinished.rename(folder)
