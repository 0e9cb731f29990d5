"""Reports of a hang: who comes first, and what is said of each."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import xrl
from xrl.launch.beats import Beat, Trouble
from xrl.launch.hang import MESSAGE_FILES, MOST_LINES, Hang, Pending, RankReport

STILL = Trouble(sentence="no rank has got anything done for 601 s")


def beat(phase: str = "update 3", phase_s: float = 40.0) -> Beat:
    return Beat(number=9, host="node1", pid=700, phase=phase, kind="update", phase_s=phase_s, pieces=3)


def collective(number: int, *, group: str = "7 (control)", is_message: bool = False) -> Pending:
    return Pending(
        name="gloo:broadcast",
        number=number,
        group=group,
        is_message=is_message,
        ranks="[0, 1, 2, 3]",
        shapes=((4, 2),),
        dtypes=("Float",),
        waited_s=30.4,
        timeout_s=600.0,
    )


def report(rank: int, *pending: Pending, silent_s: float | None = None) -> RankReport:
    return RankReport(rank=rank, beat=beat(), silent_s=silent_s, own_frame="xrl/trainer.py:110 step", pending=pending)


def order(*reports: RankReport) -> list[int]:
    return [found.rank for found in Hang.of(STILL, reports).ranks]


def test_silent_ranks_come_first_the_longest_silent_before_the_others() -> None:
    waiting = collective(5)
    assert order(report(0, waiting), report(1), report(2, silent_s=60.0), report(3, silent_s=61.0)) == [3, 2, 1, 0]


def test_a_rank_that_is_in_no_collective_comes_before_those_that_are() -> None:
    hang = Hang.of(STILL, [report(0, collective(56)), report(1), report(2, collective(56))])
    assert [found.rank for found in hang.ranks] == [1, 0, 2]
    assert hang.sentence == f"{STILL.sentence}; rank 1 is in no collective, and the others wait for it"


def test_a_rank_whose_collective_is_earlier_than_that_of_others_comes_first() -> None:
    assert order(report(0, collective(56)), report(1, collective(56)), report(2, collective(55))) == [2, 0, 1]


def test_numbers_are_compared_within_a_group() -> None:
    other = collective(3, group="9")
    assert order(report(0, collective(56)), report(1, collective(55)), report(2, other)) == [1, 2, 0]


def test_messages_between_two_ranks_have_numbers_of_their_own() -> None:
    message = collective(2, is_message=True)
    assert order(report(0, collective(56)), report(1, collective(55)), report(2, message)) == [1, 0, 2]


def test_where_all_wait_in_the_same_collective_the_sentence_says_so() -> None:
    hang = Hang.of(STILL, [report(1, collective(5)), report(0, collective(5))])
    assert hang.sentence == f"{STILL.sentence}; all wait for each other, rank 0 in the earliest"


def test_a_rank_that_waits_for_a_message_is_not_taken_for_one_at_fault() -> None:
    in_message = RankReport(rank=0, beat=beat(), own_frame="xrl/a.py:1 f", frame="torch/distributed/x.py:7 recv")
    hang = Hang.of(STILL, [in_message, report(1)])
    assert [found.rank for found in hang.ranks] == [1, 0]
    assert hang.sentence.endswith("rank 1 is in no collective, and the others wait for it")
    assert hang.lines()[1].endswith("(torch/distributed/x.py:7 recv); in a message to or from another rank")
    assert Hang.of(STILL, [in_message]).ranks[0].waits


def test_files_in_which_ranks_wait_for_messages_are_there() -> None:
    for file in MESSAGE_FILES:
        if file.startswith("xrl/"):
            assert (Path(xrl.__file__).parents[1] / file).is_file()
        else:
            assert any((Path(folder) / file).exists() for folder in sys.path)


def test_without_any_collective_nobody_is_blamed() -> None:
    assert Hang.of(STILL, [report(0), report(1)]).sentence == STILL.sentence


def test_silence_needs_no_more_blame() -> None:
    trouble = Trouble(sentence="rank 1 has not been heard of for 121 s", silent=(1,))
    assert Hang.of(trouble, [report(0, collective(5)), report(1, silent_s=121.0)]).sentence == trouble.sentence


def test_a_line_says_where_a_rank_is_and_in_which_collective() -> None:
    found = RankReport(
        rank=2,
        beat=beat(),
        own_frame="xrl/actor/broadcast.py:36 broadcast_sizes",
        frame="torch/distributed/distributed_c10d.py:2900 broadcast",
        pending=(collective(56),),
    )
    assert found.line(others_wait=True) == (
        "rank 2 on node1 (pid 700): update 3 for 40 s; at xrl/actor/broadcast.py:36 broadcast_sizes "
        "(torch/distributed/distributed_c10d.py:2900 broadcast); in gloo:broadcast #56 of group 7 (control) "
        "[0, 1, 2, 3] on [4, 2] Float for 30 s"
    )


def test_a_line_says_whom_a_rank_waits_for() -> None:
    found = RankReport(rank=0, beat=beat("rollout 2"), own_frame="a.py:1 f", frame="a.py:1 f", waits_for="8 verdicts")
    assert found.line(others_wait=True) == (
        "rank 0 on node1 (pid 700): rollout 2 for 40 s; at a.py:1 f; waits for 8 verdicts; in no collective"
    )
    assert "collective" not in found.line(others_wait=False)


def test_of_a_silent_rank_the_last_beat_is_told() -> None:
    silent = RankReport(rank=3, beat=beat(phase_s=4.0), silent_s=121.0)
    assert silent.line(others_wait=True) == ("rank 3 on node1 (pid 700): update 3 for 125 s; not heard of for 121 s")
    assert RankReport(rank=3, beat=None, silent_s=121.0).line(others_wait=True) == "rank 3; not heard of for 121 s"


def test_a_large_group_is_told_by_its_size() -> None:
    ranks = str(list(range(64)))
    fields = asdict(collective(1)) | {"ranks": ranks, "shapes": (), "dtypes": ()}
    assert str(Pending(**fields)) == "gloo:broadcast #1 of group 7 (control) 64 ranks for 30 s"


def test_of_many_ranks_those_that_matter_get_a_line() -> None:
    hang = Hang.of(STILL, [report(rank, collective(5)) for rank in range(MOST_LINES + 3)])
    assert len(hang.lines()) == MOST_LINES + 1
    assert hang.lines()[-1] == "and 3 more: ranks 8, 9, 10"
    assert hang.text().startswith(f"{hang.sentence}\n  rank 0 on node1")


def test_reports_survive_the_store_and_the_file() -> None:
    reports = [report(0, collective(5)), report(1, silent_s=3.0), RankReport(rank=2, beat=None, silent_s=3.0)]
    assert [RankReport.from_json(each.to_json().encode()) for each in reports] == reports
    hang = Hang.of(STILL, reports)
    assert Hang.from_fields(json.loads(json.dumps(asdict(hang)))) == hang


@pytest.mark.parametrize("text", ["[]", "{}", "null", json.dumps({"rank": 1, "beat": 7})])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        RankReport.from_json(text)
    with pytest.raises(ValueError):
        Hang.from_fields(json.loads(text))
