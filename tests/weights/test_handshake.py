"""Both sides know the secret, or nothing else is said."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from xrl.weights.transport import TransportError
from xrl.weights.transport.handshake import ANSWER_BYTES, QUESTION_BYTES, answer_and_ask, ask_and_answer

Side = Callable[..., None]


def meet(asking: Side, answering: Side, *, secrets: tuple[bytes, bytes] = (b"s", b"s")) -> list[Future[None]]:
    """What became of both sides."""
    there: queue.Queue[bytes] = queue.Queue()
    back: queue.Queue[bytes] = queue.Queue()

    def receive_from(source: queue.Queue[bytes]) -> Callable[[int], bytes]:
        def receive(num_bytes: int) -> bytes:
            found = source.get(timeout=5)
            assert len(found) == num_bytes
            return found

        return receive

    with ThreadPoolExecutor(2) as threads:
        return [
            threads.submit(asking, secrets[0], send=there.put, receive=receive_from(back)),
            threads.submit(answering, secrets[1], send=back.put, receive=receive_from(there)),
        ]


def test_two_who_know_the_secret_meet() -> None:
    for found in meet(ask_and_answer, answer_and_ask):
        assert found.exception() is None


def test_invited_side_without_the_secret_is_refused_and_learns_nothing() -> None:
    asking, _ = meet(ask_and_answer, answer_and_ask, secrets=(b"s", b"t"))
    assert isinstance(asking.exception(), TransportError)


def test_inviting_side_without_the_secret_is_refused() -> None:
    def guess(_: bytes, *, send: Callable[[bytes], None], receive: Callable[[int], bytes]) -> None:
        send(bytes(QUESTION_BYTES))
        receive(QUESTION_BYTES + ANSWER_BYTES)
        send(bytes(ANSWER_BYTES))

    _, answering = meet(guess, answer_and_ask)
    assert isinstance(answering.exception(), TransportError)


def test_answer_cannot_be_sent_back_as_ones_own() -> None:
    def echo(_: bytes, *, send: Callable[[bytes], None], receive: Callable[[int], bytes]) -> None:
        send(bytes(QUESTION_BYTES))
        reply: Any = receive(QUESTION_BYTES + ANSWER_BYTES)
        send(reply[QUESTION_BYTES:])

    _, answering = meet(echo, answer_and_ask)
    assert isinstance(answering.exception(), TransportError)
