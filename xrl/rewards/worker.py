"""The process that hosts one judge: questions come in through a socket, verdicts go out (`messages.py`)."""

from __future__ import annotations

import dataclasses
import errno
import json
import socket
import sys
from dataclasses import dataclass

from xrl.config import SettingsError
from xrl.launch.hearing import leave_requests_to_others
from xrl.launch.streams import prepare_streams
from xrl.rewards import framing
from xrl.rewards.judge import ANSWERS, Judge, ask
from xrl.rewards.keeper import keep
from xrl.rewards.limits import JudgeLimits
from xrl.rewards.load import load_with_check
from xrl.rewards.messages import Start, decode_question, encode_start, encode_verdict
from xrl.types import Prompt, Verdict


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the pool tells a judge's process on its command line."""

    reference: str  # as `load_judge` takes it
    asked_about: str  # ANSWERS or TRUTHS
    questions: int  # descriptors of the two sockets
    control: int
    limits: JudgeLimits
    max_log_bytes: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Order:
        fields = json.loads(text)
        return cls(**{**fields, "limits": JudgeLimits(**fields["limits"])})


def main() -> None:
    """Serve one judge until the pool closes its socket. Arguments: sys.path (not ours), the order."""
    leave_requests_to_others()  # the run stops, and then ends us
    order = Order.from_json(sys.argv[2])
    prepare_streams()  # a judge that prints must not fail because nobody reads
    questions, control = socket.socket(fileno=order.questions), socket.socket(fileno=order.control)
    # What the judge itself starts must not keep them open.
    for end in (questions, control):
        end.set_inheritable(False)
    keep(control, questions, order.limits, max_log_bytes=order.max_log_bytes)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # it may be killed at any time
    with questions:
        try:
            _serve(order, questions)
        except (EOFError, OSError):
            return  # the pool is gone


def _serve(order: Order, questions: socket.socket) -> None:
    try:
        judge, check = load_with_check(order.reference)
    except SettingsError as error:
        framing.send(questions, encode_start(Start(error=str(error), checks_truths=False)))
        return
    framing.send(questions, encode_start(Start(error="", checks_truths=check is not None)))

    def check_truth(_: str, prompt: Prompt) -> float:
        """The judge's check of ground truths in the form of a judge: 1 where it has nothing against one."""
        if check is not None:
            check(prompt)
        return 1.0

    asked: Judge = judge if order.asked_about == ANSWERS else check_truth
    while True:
        number, response, prompt = decode_question(framing.receive(questions))
        verdict = _named(ask(asked, response, prompt, catches=BaseException))
        framing.send(questions, encode_verdict(number, verdict))


def _named(verdict: Verdict) -> Verdict:
    """With the flag, where a limit of ours is what the judge met."""
    if verdict.failure == "MemoryError":
        return dataclasses.replace(verdict, detail=f"{verdict.detail or 'no more memory'}: see --judge-memory-gb")
    if verdict.failure == "OSError" and verdict.detail.startswith(f"[Errno {errno.EFBIG}]"):
        return dataclasses.replace(verdict, detail=f"{verdict.detail}: see --judge-max-file-gb")
    return verdict
