"""Room on the disk for the checkpoints of a run: it would be noticed at the end otherwise, with the model lost."""

from __future__ import annotations

import errno
import math
import os

from xrl.config import Settings, SettingsError
from xrl.files.disk import check_file_size, check_space, is_read_only
from xrl.metrics.run_folder import CHECKPOINT_NAME
from xrl.models.shape import ModelShape
from xrl.preflight.machine import has_cuda_driver
from xrl.weights.other_files import find_other_files
from xrl.weights.plan import part_names, tensor_shapes
from xrl.weights.weight_files import MAX_SHARD_BYTES

# Of the run itself: settings, metrics, logs, the curve, headers of files, and what disks round up.
RECORD_BYTES = 2**20
RECORD_FILES = 10


def check_disk(settings: Settings, shape: ModelShape, *, num_rows: int) -> None:
    """Refuse a run whose disk cannot hold `hf-final` and the `hf-<step>` folders beside it.

    Args:
        num_rows: of the training data.

    Raises:
        SettingsError: too little space, with what is needed and what is free, or a disk that takes no writes.
    """
    run, folder = settings.run, settings.model.model
    if is_read_only(run.output_dir):  # what is free there says nothing
        raise SettingsError(f"{run.output_flag} must be a folder that can be written to: {os.strerror(errno.EROFS)}")
    num_saves = _num_saves(settings, num_rows)
    # One more than are kept: the oldest is removed when the newest is whole.
    num_folders = 1 + (num_saves if run.save_keep is None else min(num_saves, run.save_keep))
    if run.run_dir is not None:  # those of earlier attempts are there already
        num_there = sum(CHECKPOINT_NAME.fullmatch(path.name) is not None for path in run.run_dir.glob("hf-*"))
        num_folders = max(1, num_folders - num_there)
    weight_bytes, others = _weight_bytes(settings, shape), find_other_files(folder, target=run.output_dir)
    num_files = len(others.copied) + 2 + weight_bytes // MAX_SHARD_BYTES  # the folder, weights
    what = f"{run.output_flag} (for {num_folders:,} Hugging Face checkpoint{'s' if num_folders > 1 else ''})"
    check_file_size(min(weight_bytes, MAX_SHARD_BYTES), what=what)
    check_space(
        run.output_dir,
        num_folders * (weight_bytes + others.num_bytes()) + RECORD_BYTES,
        what=what,
        num_files=num_folders * num_files + RECORD_FILES,
        instead=f": free some, use another {run.output_flag.split()[0]}"
        + (", or --save-keep" if num_folders > 2 else ""),
    )


def _num_saves(settings: Settings, num_rows: int) -> int:
    """`hf-<step>` folders of the whole run."""
    data = settings.data
    num_rollouts = data.num_rollouts or num_rows * data.num_epochs // data.rollout_batch_size
    return max(0, num_rollouts - 1) // settings.run.save_interval if settings.run.save_interval else 0


def _weight_bytes(settings: Settings, shape: ModelShape) -> int:
    """Bytes of the weights, in the number format that is trained."""
    is_bf16 = has_cuda_driver() if settings.model.bf16 is None else settings.model.bf16
    sizes = (size for part in part_names(shape) for size in tensor_shapes(shape, part).values())
    return sum(math.prod(size) for size in sizes) * (2 if is_bf16 else 4)
