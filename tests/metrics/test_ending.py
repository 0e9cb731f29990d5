"""What a run that ends early leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from xrl.config import SettingsError
from xrl.launch.exit import RunEnded, agents_file, prepare_agents_file
from xrl.metrics.ending import Ending, where_things_are, words_of_ranks
from xrl.metrics.journal import Journal
from xrl.metrics.run_folder import RunFolder
from xrl.metrics.sinks import JsonLinesSink


def write_rows(folder: RunFolder, *rows: tuple[int, str]) -> None:
    sink = JsonLinesSink(folder.metrics)
    for step, name in rows:
        sink.write(step, {name: 1.0})
    sink.close()


@pytest.fixture
def rank_below_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process looks like rank 0 below `xrl train`; the file in which it leaves what is to be said."""
    error_file = tmp_path / "logs" / "run" / "attempt_0" / "0" / "error.json"
    error_file.parent.mkdir(parents=True)
    for name, value in {"TORCHELASTIC_RUN_ID": "run", "RANK": "0", "TORCHELASTIC_ERROR_FILE": str(error_file)}.items():
        monkeypatch.setenv(name, value)
    return prepare_agents_file(tmp_path / "logs")


def test_a_run_that_has_just_begun_has_nothing_saved(tmp_path: Path) -> None:
    assert where_things_are(RunFolder(tmp_path), None) == (
        f"before the first rollout was learned from; run folder {tmp_path}; "
        f"no checkpoint yet (--state-interval N saves the run's state every N rollouts, --save-interval N its model)"
    )


def test_rollouts_are_counted_and_evaluations_are_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_rows(folder, (0, "eval/greedy"))
    assert where_things_are(folder, 200).startswith("before the first rollout")
    write_rows(folder, (1, "updates"), (2, "updates"), (3, "eval/greedy"))
    assert where_things_are(folder, 200).startswith(f"after rollout 2 of 200; run folder {tmp_path}; ")
    assert where_things_are(folder, None).startswith(f"after rollout 2; run folder {tmp_path}; ")


def test_newest_checkpoint_is_where_a_new_run_starts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("hf-9", "hf-10", "hf-11.partial", ".hf-12", "hf-²"):
        (tmp_path / name).mkdir()
    assert where_things_are(folder, 20).endswith(
        f"saved: hf-10 (the newest); a new run can start from it with --model {tmp_path / 'hf-10'}"
    )
    folder.final_checkpoint.mkdir()
    assert where_things_are(folder, 20).endswith(f"--model {tmp_path / 'hf-final'}")


def test_metrics_that_cannot_be_read_are_no_reason_to_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("not JSON\n{}\n")
    assert f"run folder {tmp_path}" in where_things_are(RunFolder(tmp_path), 3)


def test_a_run_without_a_folder_has_nothing_to_say() -> None:
    assert Ending().words_about(RuntimeError()) == ""


def test_sentences_that_say_it_all_get_nothing_beside_them(tmp_path: Path) -> None:
    ending = Ending()
    ending.begin(RunFolder(tmp_path))
    assert (
        ending.words_about(SettingsError("--lr"))
        == ending.words_about(RunEnded("nothing learned", says_where=True))
        == ""
    )
    assert str(tmp_path) in ending.words_about(RuntimeError())


def test_a_rank_leaves_the_word_to_the_command_above_it(tmp_path: Path, rank_below_the_agent: Path) -> None:
    assert agents_file() == rank_below_the_agent
    assert words_of_ranks(rank_below_the_agent) == ""  # no rank has a run folder yet
    ending = Ending()
    ending.begin(RunFolder(tmp_path))
    assert words_of_ranks(rank_below_the_agent).startswith("before the first rollout")
    ending.expect(7)
    write_rows(RunFolder(tmp_path), (3, "updates"))
    assert ending.words_about(RuntimeError()) == ""
    assert words_of_ranks(rank_below_the_agent).startswith(f"after rollout 3 of 7; run folder {tmp_path}; ")
    ending.words_about(RunEnded("nothing learned", says_where=True))
    assert words_of_ranks(rank_below_the_agent) == ""


def test_a_rank_of_plain_torchrun_speaks_itself(tmp_path: Path, rank_below_the_agent: Path) -> None:
    rank_below_the_agent.unlink()
    ending = Ending()
    ending.begin(RunFolder(tmp_path))
    assert agents_file() is None
    assert str(tmp_path) in ending.words_about(RuntimeError())


def test_rollouts_count_though_their_metrics_cannot_be_written(tmp_path: Path, rank_below_the_agent: Path) -> None:
    ending = Ending()
    ending.begin(RunFolder(tmp_path))
    ending.expect(6)
    (tmp_path / "metrics.jsonl").mkdir()
    journal = Journal(RunFolder(tmp_path), tensorboard=False, log_interval=1, num_rollouts=6, ending=ending)
    journal.step(5, {"reward/mean": 0.5, "updates": 1.0})
    journal.close()
    assert words_of_ranks(rank_below_the_agent).startswith(f"after rollout 5 of 6; run folder {tmp_path}; ")
    rank_below_the_agent.unlink()
    assert ending.words_about(RuntimeError()).startswith(f"after rollout 5 of 6; run folder {tmp_path}; ")


def test_words_that_were_left_half_written_are_none(tmp_path: Path) -> None:
    file = prepare_agents_file(tmp_path)
    file.write_text('["/some/fol')
    assert words_of_ranks(file) == ""
    file.unlink()
    assert words_of_ranks(file) == ""
