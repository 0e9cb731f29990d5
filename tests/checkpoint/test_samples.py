"""Samples go to a file and come back to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.samples import sample
from xrl.checkpoint.samples import read_samples, write_samples
from xrl.config import SettingsError
from xrl.types import Sample


def contents(one: Sample) -> dict[str, object]:
    return {
        name: (value.dtype.str, value.tobytes()) if isinstance(value, np.ndarray) else value
        for name, value in vars(one).items()
    }


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    samples = [
        sample([5, 6, 7], [11, 2], advantage=1 / 3, group_id=0, temperature=0.7),
        sample([8], [14], logprobs=[-0.1], advantage=-1.5, group_id=4, temperature=0.1),
    ]
    path = tmp_path / "samples" / "step-1.safetensors"
    write_samples(path, samples)
    assert [contents(each) for each in read_samples(path)] == [contents(each) for each in samples]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_rollout_without_samples_is_one_too(tmp_path: Path) -> None:
    write_samples(tmp_path / "none.safetensors", [])
    assert read_samples(tmp_path / "none.safetensors") == []


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("text")
    for name in ("other", "missing"):
        with pytest.raises(SettingsError, match="holds no recorded samples"):
            read_samples(tmp_path / name)
