"""An algorithm of the user's own, tried out before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from xrl.algorithms.trial import AlgorithmTrial
from xrl.config import AlgorithmConfig, SettingsError

# What a run needs of an algorithm, without the import of torch.
WHOLE = """
import os, time


class Whole:
    fused_loss = None

    def __init__(self, config):
        self.settings = config
        {built}

    def score(self, groups): ...
    def keep(self, group): ...
    def token_shares(self, sizes): ...
    def loss(self, inputs): ...
"""


def try_out(folder: Path, source: str, *, limit_s: float = 60.0, **settings: object) -> None:
    (folder / "mine.py").write_text(source)
    config = AlgorithmConfig(algorithm=f"{folder}/mine.py:Whole", **settings)  # type: ignore[arg-type]
    with AlgorithmTrial(config, limit_s=limit_s) as trial:
        trial.finish()


def refusal(folder: Path, source: str, *, limit_s: float = 60.0) -> str:
    with pytest.raises(SettingsError) as refused:
        try_out(folder, source, limit_s=limit_s)
    return str(refused.value)


def test_an_algorithm_is_built_from_the_settings_of_the_run(tmp_path: Path) -> None:
    try_out(tmp_path, WHOLE.format(built="assert config.updates_per_rollout == 3"), updates_per_rollout=3)


def test_what_it_raises_is_refused_with_file_and_line(tmp_path: Path) -> None:
    said = refusal(tmp_path, WHOLE.format(built="{}['kl']"))
    assert said.startswith(
        f"--algorithm {tmp_path}/mine.py:Whole: Whole cannot be built from the settings: KeyError: 'kl'"
    )
    assert said.endswith("mine.py, line 10, in __init__)")


def test_what_it_lacks_is_refused(tmp_path: Path) -> None:
    assert "Whole lacks loss(): derive it from" in refusal(tmp_path, WHOLE.format(built="").replace("loss(", "lose("))


def test_one_that_does_not_end_is_refused_with_file_and_line(tmp_path: Path) -> None:
    said = refusal(tmp_path, WHOLE.format(built="time.sleep(600)"), limit_s=0.2)
    assert "cannot be built from the settings: TimeoutError: it took longer than 0.2 s (" in said
    assert said.endswith("mine.py, line 10, in __init__)")
    said = refusal(tmp_path, "import time\ntime.sleep(600)", limit_s=0.2)
    assert "cannot import" in said and said.endswith("mine.py, line 2)")


def test_one_that_ends_its_process_is_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, WHOLE.format(built="os.write(2, b'last words'); os._exit(7)"))
    assert said.endswith("mine.py:Whole ended the process that tried it out: exit code 7, last words")
