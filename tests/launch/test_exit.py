"""A rank's error is shown once, by the rank that failed first, and the rank ends whatever it waits for."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from tests.launch.processes import started

TOY = str(Path(__file__).with_name("toy_rank.py"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run(folder: Path, *what: str) -> tuple[int, str]:
    """Exit code and stderr of one toy rank."""
    with started(folder, TOY, str(folder), *what) as toy:
        return toy.process.wait(60), toy.stderr


def test_work_done_ends_with_0(tmp_path: Path) -> None:
    assert run(tmp_path, "work") == (0, "")
    assert (tmp_path / "cleaned-0").exists()


def test_bad_settings_end_with_2_and_a_sentence(tmp_path: Path) -> None:
    assert run(tmp_path, "bad settings") == (2, "xrl: error: --lr must be >= 0, got -1\n")


def test_error_is_shown_once_with_its_traceback(tmp_path: Path) -> None:
    code, stderr = run(tmp_path, "fail")
    assert code == 1
    assert stderr.count("Traceback") == 1 and stderr.count("ValueError: the first error") == 2
    assert stderr.endswith("\nxrl: error: ValueError: the first error\n")
    assert (tmp_path / "cleaned-0").exists()


def test_where_there_are_several_hosts_an_error_names_its_own(tmp_path: Path) -> None:
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "run"}
    with started(tmp_path, TOY, str(tmp_path), "fail", **place) as toy:
        assert toy.process.wait(60) == 1
        assert toy.stderr.endswith(f"\nxrl: error: rank 3 on {socket.gethostname()}: ValueError: the first error\n")


def test_only_the_first_error_is_shown(tmp_path: Path) -> None:
    code, stderr = run(tmp_path, "fail in clean-up too")
    assert code == 1
    assert "the first error" in stderr and "the second error" not in stderr


def test_message_of_sys_exit_is_shown(tmp_path: Path) -> None:
    assert run(tmp_path, "stop with a message") == (1, "no more work\n")


def test_run_that_ends_itself_says_why_in_one_sentence(tmp_path: Path) -> None:
    assert run(tmp_path, "end itself", "with words") == (
        1,
        "xrl: error: nothing more to do\nxrl: ended after rollout 3 of 9; run folder here\n",
    )
    assert (tmp_path / "cleaned-0").exists()


def test_error_is_followed_by_what_is_left_of_the_run(tmp_path: Path) -> None:
    code, stderr = run(tmp_path, "fail", "with words")
    assert code == 1
    assert stderr.endswith(
        "\nxrl: error: ValueError: the first error\nxrl: ended after rollout 3 of 9; run folder here\n"
    )


def test_failure_outside_this_process_is_one_sentence_without_a_traceback(tmp_path: Path) -> None:
    assert run(tmp_path, "fail for a worker", "with words") == (
        1,
        "xrl: error: rollout worker 0 (10.0.0.2:80): connection refused\n"
        "xrl: ended after rollout 3 of 9; run folder here\n",
    )
    assert (tmp_path / "cleaned-0").exists()


def test_bad_settings_leave_nothing_to_speak_of(tmp_path: Path) -> None:
    assert run(tmp_path, "bad settings", "with words") == (2, "xrl: error: --lr must be >= 0, got -1\n")


def test_stopped_run_says_what_is_left_of_it_in_the_same_line(tmp_path: Path) -> None:
    with started(tmp_path, TOY, str(tmp_path), "wait", "with words") as toy:
        toy.wait_for((tmp_path / "waits-0").exists)
        assert toy.end(toy.process.pid, signal.SIGINT) == 128 + signal.SIGINT
        assert toy.stderr == "xrl: stopped by SIGINT after rollout 3 of 9; run folder here\n"


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_end_themselves_say_why_once(tmp_path: Path) -> None:
    with started(tmp_path, *TORCHRUN, TOY, str(tmp_path), "end itself") as ranks:
        assert ranks.process.wait(120) == 1
        assert [line for line in ranks.stderr.splitlines() if line.startswith("xrl: ")] == [
            "xrl: error: nothing more to do"
        ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_cleans_up_and_says_so_in_a_line(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, TOY, str(tmp_path), "wait") as toy:
        toy.wait_for((tmp_path / "waits-0").exists)
        assert toy.end(toy.process.pid, number) == 128 + number
        assert toy.stderr == f"xrl: stopped by {number.name}\n"
    assert (tmp_path / "cleaned-0").exists()


def test_a_terminal_that_goes_is_no_news_to_a_process_that_was_to_outlive_it(tmp_path: Path) -> None:
    with started(tmp_path, TOY, str(tmp_path), "wait", nohup=True) as toy:
        toy.wait_for((tmp_path / "waits-0").exists)
        toy.process.send_signal(signal.SIGHUP)
        assert toy.end(toy.process.pid, signal.SIGTERM) == 128 + signal.SIGTERM
        assert toy.stderr == "xrl: stopped by SIGTERM\n"


def test_second_ctrl_c_does_not_cut_clean_up_short(tmp_path: Path) -> None:
    with started(tmp_path, TOY, str(tmp_path), "slow clean-up") as toy:
        toy.wait_for((tmp_path / "waits-0").exists)
        toy.process.send_signal(signal.SIGINT)
        toy.wait_for((tmp_path / "cleaning-0").exists)
        assert toy.end(toy.process.pid, signal.SIGINT) == 128 + signal.SIGINT
    assert (tmp_path / "cleaned-0").exists()


@pytest.mark.slow
def test_clean_up_that_hangs_is_cut_short(tmp_path: Path) -> None:
    code, stderr = run(tmp_path, "hang in clean-up")
    assert code == 1 and "the first error" in stderr
    assert (tmp_path / "hangs-0").exists() and not (tmp_path / "cleaned-0").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_torchrun_even_in_a_collective(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, *TORCHRUN, TOY, str(tmp_path), "wait in a collective") as ranks:
        ranks.wait_for(lambda: (tmp_path / "waits-0").exists() and (tmp_path / "waits-1").exists())
        assert ranks.end(ranks.process.pid, number) != 0


@pytest.mark.slow
@pytest.mark.distributed
def test_rank_that_hears_of_anothers_error_is_silent(tmp_path: Path) -> None:
    with started(tmp_path, *TORCHRUN, TOY, str(tmp_path), "fail in one rank") as ranks:
        assert ranks.process.wait(120) == 1
        assert [line for line in ranks.stderr.splitlines() if line.startswith("xrl: ")] == [
            "xrl: error: rank 0: ValueError: the first error"
        ]


@pytest.mark.slow
@pytest.mark.distributed
def test_rank_that_hears_of_anothers_death_leaves_the_word_to_torchrun(tmp_path: Path) -> None:
    with started(tmp_path, *TORCHRUN, TOY, str(tmp_path), "wait in a collective") as ranks:
        ranks.wait_for(lambda: (tmp_path / "waits-0").exists() and (tmp_path / "waits-1").exists())
        assert ranks.end(int((tmp_path / "waits-0").read_text()), signal.SIGKILL) == 1
        assert "xrl: " not in ranks.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_rank_0_that_hears_of_anothers_death_says_what_is_left_of_the_run(tmp_path: Path) -> None:
    with started(tmp_path, *TORCHRUN, TOY, str(tmp_path), "wait in a collective", "with words") as ranks:
        ranks.wait_for(lambda: (tmp_path / "waits-0").exists() and (tmp_path / "waits-1").exists())
        assert ranks.end(int((tmp_path / "waits-1").read_text()), signal.SIGKILL) == 1
        assert [line for line in ranks.stderr.splitlines() if line.startswith("xrl: ")] == [
            "xrl: stopped by SIGTERM after rollout 3 of 9; run folder here"
        ]
