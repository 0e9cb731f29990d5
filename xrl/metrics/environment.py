"""What a run ran on: enough to repeat it, nothing that must stay private."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from xrl.files.whole import write_whole
from xrl.metrics.command import typed_command

PACKAGES = (
    "xrl",
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "lmdeploy",
    "triton",
    "numpy",
)

# Named one by one: the environment also holds tokens and keys, and a prefix such as SLURM_ would let SLURM_JWT out.
VARIABLES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_OFFLINE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MKL_NUM_THREADS",
    "NCCL_ALGO",
    "NCCL_CUMEM_ENABLE",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_IB_HCA",
    "NCCL_NVLS_ENABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_PROTO",
    "NCCL_SHM_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "NVTE_FLASH_ATTN",
    "NVTE_FUSED_ATTN",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_NODELIST",
    "SLURM_NNODES",
    "SLURM_NTASKS",
    "TOKENIZERS_PARALLELISM",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "WORLD_SIZE",
)


def describe_environment() -> dict[str, Any]:
    """Versions, machine, devices, the listed environment variables that are set, and the command line."""
    return {
        "command_line": typed_command(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "git": git_state(Path(__file__).resolve().parents[2]),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu_cores": len(psutil.Process().cpu_affinity())
        if hasattr(psutil.Process, "cpu_affinity")
        else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "devices": device_names(),
        "variables": chosen_variables(os.environ),
    }


def write_environment(path: Path) -> None:
    """Write `describe_environment()` as JSON, of ASCII alone: names of files on a command line need not be UTF-8.

    Raises:
        NotWritten: nothing was written.
    """
    write_whole(path, f"{json.dumps(describe_environment(), indent=2)}\n".encode())


def package_versions() -> dict[str, str]:
    """Versions of those PACKAGES that are installed, read without importing them."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def device_names() -> list[str]:
    """Names of the CUDA devices this process sees; without any, the CPU's architecture."""
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [f"cpu ({platform.processor() or platform.machine()})"]


def chosen_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Those of VARIABLES that are set."""
    return {name: environ[name] for name in VARIABLES if name in environ}


def git_state(root: Path) -> dict[str, Any] | None:
    """Commit of the checkout at root, and whether files differ from it; None where root is not a checkout."""
    # An installed package may lie inside somebody else's repository, whose commit would say nothing about this code.
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "modified": bool(changed)}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
