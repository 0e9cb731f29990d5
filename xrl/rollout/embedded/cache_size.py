"""How much memory the KV cache may take."""

from __future__ import annotations

import psutil
import torch

from xrl.config import SettingsError
from xrl.models.shape import ModelShape
from xrl.rollout.embedded import bytes_per_block, least_blocks
from xrl.weights.plan import num_parameters

# Of what is free beside the weights. On the CPU others need memory too, such as the trainer, and take it later.
CUDA_SHARE = 0.9
CPU_SHARE = 0.5


def max_blocks(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    max_model_len: int,
    num_bytes: int | None,
    num_workers_on_host: int,
) -> int:
    """Most blocks of the cache.

    Args:
        max_model_len: longest prompt + response in tokens.
        num_bytes: most that the cache takes; None: a share of what is free now.
        num_workers_on_host: that divide the CPU's memory among them.

    Raises:
        SettingsError: one sequence of max_model_len tokens does not fit.
    """
    each = bytes_per_block(shape, dtype.itemsize)
    found = f"--kv-cache-gb {(num_bytes or 0) / 1e9:g}"
    if num_bytes is None:
        num_bytes = _free_share(device, num_parameters(shape) * dtype.itemsize, num_workers_on_host)
        found = f"the memory that is free on {device}, of which the KV cache may take {num_bytes / 1e9:.3g} GB,"
    needed = least_blocks(max_model_len)
    if num_bytes // each < needed:
        raise SettingsError(
            f"{found} does not hold the keys and values of one sequence of --max-model-len {max_model_len} tokens, "
            f"which take {needed * each / 1e9:.3g} GB"
        )
    return num_bytes // each


def _free_share(device: torch.device, weight_bytes: int, num_workers_on_host: int) -> int:
    """Bytes of those that are free now; the weights come later."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(0, int(CUDA_SHARE * (free - weight_bytes)))
    share = CPU_SHARE * psutil.virtual_memory().available / num_workers_on_host
    return max(0, int(share - weight_bytes))
