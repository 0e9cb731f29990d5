"""What a run tells its user."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from xrl.metrics.journal import Journal
from xrl.metrics.run_folder import RunFolder


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("xrl"), "propagate", True)
    caplog.set_level(logging.INFO, logger="xrl")
    return caplog


def journal(folder: Path) -> Journal:
    return Journal(RunFolder(folder), tensorboard=False, log_interval=1, num_rollouts=2)


def test_last_line_names_the_run_folder(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    journal(tmp_path).finish()
    assert said.messages[-1] == f"run folder: {tmp_path}"


def test_evaluations_of_start_and_end_are_compared_once(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    run = journal(tmp_path)
    for index in range(3):
        run.evaluation(index, {"eval/pass@1": 0.5})
    run.finish()
    assert sum("before" in message for message in said.messages) == 1


def test_loss_of_the_first_update_is_explained_where_it_is_0(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    run = journal(tmp_path)
    run.first_update({"loss": 0.1, "ratio": 1.0, "grad_norm": 0.5})
    assert said.messages == []
    run.first_update({"loss": 1e-9, "ratio": 1.0, "grad_norm": 0.5})
    assert len(said.messages) == 1 and said.records[0].levelname == "INFO"
    run.close()


def test_warning_is_one(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    run = journal(tmp_path)
    run.warn("nothing was learned")
    run.close()
    assert [(record.levelname, record.message) for record in said.records] == [("WARNING", "nothing was learned")]


def test_a_curve_that_cannot_be_written_fails_no_run(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    folder = RunFolder.create(tmp_path)
    folder.reward_curve.mkdir()
    folder.metrics.write_text('{"step": 1, "reward/mean": 0.5}\n')
    journal = Journal(folder, tensorboard=False, log_interval=1, num_rollouts=1)
    journal.finish()
    assert "reward_curve.png cannot be written: Is a directory" in said.text
    assert said.messages[-1] == f"run folder: {folder.path}"


def test_a_run_folder_that_is_gone_fails_no_run(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    run = journal(tmp_path / "run")
    for index in (1, 2):
        run.rollout(index, [], [], 0, {})
        run.step(index, {"step_seconds": 1.0})
    run.finish()
    warnings = [record.message for record in said.records if record.levelname == "WARNING"]
    assert len(warnings) == 2 and "could not be written to the end" in warnings[1]
    assert warnings[0].startswith(
        f"{tmp_path / 'run' / 'rollout_idx_1_trajectory.jsonl'} cannot be written: No such file or directory"
    )
    assert "saved trajectories" not in said.text
    assert list(tmp_path.iterdir()) == []


def test_metrics_that_somebody_has_edited_fail_no_run(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    run = journal(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("oops\n\n")
    run.finish()
    assert "no reward curve is drawn: " in said.text and "line 1 is not JSON" in said.text
