"""Whatever a judge's process writes ends in time, as a verdict with a sane reward or as a failure in plain words."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.conftest import Fuzz
from xrl.rewards.framing import Asker, BadMessage
from xrl.rewards.judge import MAX_REWARD
from xrl.rewards.limits import JudgeLimits
from xrl.rewards.messages import decode_verdict
from xrl.rewards.process import JudgeSetup
from xrl.rewards.processes import ProcessJudges
from xrl.types import Prompt, Verdict

ODD_JUDGES = Path(__file__).parents[1] / "rewards" / "odd_judges.py"
PATIENCE_S = 60.0
NUMBER = 7

ODD_VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    10**400,
    1e308,
    -0.0,
    "",
    "\x1b[2J\n\u2028\u202e\ud800",
    [],
    {},
    [[[]]],
    "x" * 500,
]


def message(rng: random.Random) -> bytes:
    """A verdict, right or damaged."""
    fields: dict[Any, Any] = {
        "number": NUMBER,
        "reward": rng.uniform(-2, 2),
        "failure": "",
        "detail": "",
        "location": "",
    }
    for _ in range(rng.choice((0, 0, 1, 2))):
        fields[rng.choice([*fields, "more"])] = rng.choice(ODD_VALUES)
    if rng.random() < 0.2:
        fields.pop(rng.choice(list(fields)))
    text = bytearray(json.dumps(fields, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"))
    if rng.random() < 0.3:
        text[rng.randrange(len(text))] = rng.randrange(256)
    if rng.random() < 0.1:
        text = bytearray(rng.randbytes(rng.randrange(200)))
    return bytes(text)


def is_sane(verdict: Verdict) -> bool:
    if verdict.failed:
        return verdict.reward is None and verdict.error.isprintable()
    return verdict.reward is not None and abs(verdict.reward) <= MAX_REWARD


def test_any_message_is_a_sane_verdict_or_a_bad_message(fuzz: Fuzz) -> None:
    rng = fuzz.random()
    num_taken = 0
    for _ in range(fuzz.num_cases(3000)):
        text = message(rng)
        try:
            verdict = decode_verdict(text, NUMBER)
        except BadMessage as error:
            assert str(error).isprintable(), text
        else:
            assert is_sane(verdict), text
            num_taken += 1
    assert num_taken


def written(rng: random.Random) -> bytes:
    """Bytes on the socket: messages, right and wrong lengths, rubbish."""
    parts = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        text = message(rng)
        length = len(text) if rng.random() < 0.7 else rng.choice((0, 1, len(text) - 1, len(text) + 1, 2**31, 2**32 - 1))
        parts.append(struct.pack("!I", max(0, length)) + text)
    data = b"".join(parts)
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data


def test_any_bytes_on_the_socket_end_in_time(fuzz: Fuzz) -> None:
    rng = fuzz.random()
    for _ in range(fuzz.num_cases(60)):
        ours, theirs = socket.socketpair()
        asker = Asker(ours)
        if rng.random() < 0.2:
            theirs.sendall(written(rng))  # without being asked
        data, closes = written(rng), rng.random() < 0.5

        def answer(theirs: socket.socket = theirs, data: bytes = data, closes: bool = closes) -> None:
            theirs.sendall(data)
            if closes:
                theirs.close()

        thread = threading.Thread(target=answer)
        thread.start()
        question = b"?" * rng.choice((1, 10, 2_000_000))
        try:
            assert is_sane(decode_verdict(asker.exchange(question, limit_s=0.02), NUMBER)), data
        except (TimeoutError, BadMessage, EOFError) as error:
            assert str(error).isprintable(), data
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        theirs.close()
        asker.close()


@pytest.mark.fuzz
def test_any_order_of_hostile_answers_costs_those_answers_alone(fuzz: Fuzz, tmp_path: Path) -> None:
    rng = fuzz.random()
    limits = JudgeLimits(memory_bytes=300_000_000, max_processes=8, max_file_bytes=1_000_000)
    setup = JudgeSetup(reference=f"{ODD_JUDGES}:as_told", limits=limits, log_dir=tmp_path)
    pool = ProcessJudges(setup, timeout_s=3.0, num_workers=2)
    actions = [
        *("pickle", "wrong length", "flood", "answer another question", "infinite reward", "half a message"),
        *("byte now and then", "close the socket", "speak later", "stop reading", "odd words", "take processes"),
        *("print much", "vanish", "segfault", "start a session", "fork twice", "stop the keeper", "kill the keeper"),
    ]
    for case in range(fuzz.num_cases(5)):
        prompt = Prompt(id=case, token_ids=[], text="", ground_truth="", extra={"file": str(tmp_path / "pid")})
        verdicts = [pool.submit(rng.choice(actions), prompt) for _ in range(4)]
        assert all(is_sane(verdict.result(PATIENCE_S)) for verdict in verdicts)
    # What they did late, or to the next answer, is over by then.
    for _ in range(8):
        pool.submit("pid", Prompt(id=0, token_ids=[], text="", ground_truth="")).result(PATIENCE_S)
    assert not pool.submit("pid", Prompt(id=0, token_ids=[], text="", ground_truth="")).result(PATIENCE_S).failed
    pool.close()
