"""One tiny checkpoint and one data file for all tests here; each test damages its own copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.small_runs import Refusal, check, write_rows
from tests.tiny_models import make_checkpoint
from xrl.config import SettingsError


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Qwen3 in several shards."""
    return make_checkpoint(tmp_path_factory.mktemp("pristine"), tied=False, max_shard_bytes=150_000)


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.jsonl", [{"prompt": "1+1=?", "ground_truth": "2"}] * 8)


@pytest.fixture
def refusal(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """The sentence with which settings are refused."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def refuse(*flags: str, world_size: int = 1) -> str:
        with pytest.raises(SettingsError) as caught:
            check(model, data, tmp_path, *flags, world_size=world_size)
        sentence = str(caught.value)
        assert "\n" not in sentence
        assert not (tmp_path / "work").exists(), "nothing is written before all is checked"
        return sentence

    return refuse
