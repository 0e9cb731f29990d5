"""Messages over a socket whose other end does what it likes."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from xrl.rewards.framing import MAX_ANSWER_BYTES, Asker, BadMessage, receive, send

PATIENCE_S = 60.0


@pytest.fixture
def ends() -> Iterator[tuple[Asker, socket.socket]]:
    ours, theirs = socket.socketpair()
    asker = Asker(ours)
    yield asker, theirs
    theirs.close()
    asker.close()


Ends = tuple[Asker, socket.socket]


def framed(message: bytes) -> bytes:
    return struct.pack("!I", len(message)) + message


def in_thread(action: Callable[[], object]) -> None:
    threading.Thread(target=action, daemon=True).start()


def test_each_question_gets_its_answer_however_long_it_is(ends: Ends) -> None:
    asker, theirs = ends

    def answer() -> None:
        for _ in range(3):
            send(theirs, b"%d" % len(receive(theirs)))

    in_thread(answer)
    for length in (0, 1, 5_000_000):  # the last one is more than any socket's buffer
        assert asker.exchange(b"x" * length, limit_s=PATIENCE_S) == b"%d" % length


def test_answer_in_pieces_is_put_together(ends: Ends) -> None:
    asker, theirs = ends

    def trickle() -> None:
        for place in range(len(whole)):
            theirs.sendall(whole[place : place + 1])

    whole = framed(b"an answer")
    in_thread(trickle)
    assert asker.exchange(None, limit_s=PATIENCE_S) == b"an answer"


@pytest.mark.parametrize("written", [b"", b"\0", framed(b"whole")[:-1]], ids=["nothing", "half a length", "half"])
def test_answer_that_does_not_come_whole_ends_with_the_time(ends: Ends, written: bytes) -> None:
    asker, theirs = ends
    theirs.sendall(written)
    with pytest.raises(TimeoutError, match="not whole" if written else "^$"):
        asker.exchange(None, limit_s=0.05)


def test_question_that_is_not_read_ends_with_the_time(ends: Ends) -> None:
    asker, _ = ends
    with pytest.raises(TimeoutError, match="did not read the question"):
        asker.exchange(b"x" * 10_000_000, limit_s=0.05)


def test_byte_now_and_then_does_not_stretch_the_time(ends: Ends) -> None:
    asker, theirs = ends
    theirs.sendall(struct.pack("!I", 1000))
    has_ended = threading.Event()

    def trickle() -> None:
        while not has_ended.wait(0.02):
            theirs.sendall(b"x")

    in_thread(trickle)
    with pytest.raises(TimeoutError):
        asker.exchange(None, limit_s=0.2)
    has_ended.set()


def test_answer_that_is_there_counts_also_after_the_time() -> None:
    """Whoever asks may itself have been stopped meanwhile."""
    ours, theirs = socket.socketpair()
    theirs.sendall(framed(b"in time"))
    assert Asker(ours).exchange(None, limit_s=-1.0) == b"in time"
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        (struct.pack("!I", MAX_ANSWER_BYTES + 1), f"a message of {MAX_ANSWER_BYTES + 1} bytes"),
        (b"\xff\xff\xff\xff" + b"x" * 100, "a message of 4294967295 bytes"),
        (framed(b"one") + framed(b"two"), "more than one message"),
        (framed(b"one") + b"\0", "more than one message"),
    ],
)
def test_what_the_protocol_does_not_allow_is_a_bad_message(ends: Ends, written: bytes, sentence: str) -> None:
    asker, theirs = ends
    theirs.sendall(written)
    with pytest.raises(BadMessage, match=sentence):
        asker.exchange(None, limit_s=PATIENCE_S)


def test_flood_of_bytes_is_not_kept(ends: Ends) -> None:
    asker, theirs = ends

    def flood() -> None:
        try:
            while True:
                theirs.sendall(b"y" * 65536)
        except OSError:
            pass

    in_thread(flood)
    with pytest.raises(BadMessage):
        asker.exchange(None, limit_s=PATIENCE_S)


def test_what_is_said_without_being_asked_is_a_bad_message(ends: Ends) -> None:
    asker, theirs = ends
    theirs.sendall(framed(b"late"))
    with pytest.raises(BadMessage, match="without being asked"):
        asker.exchange(b"?", limit_s=PATIENCE_S)


def test_answer_before_the_question_was_read_is_a_bad_message(ends: Ends) -> None:
    asker, theirs = ends

    def speak_first() -> None:
        theirs.recv(1)
        theirs.sendall(framed(b"I know it"))

    in_thread(speak_first)
    with pytest.raises(BadMessage, match="before it had read the question"):
        asker.exchange(b"x" * 10_000_000, limit_s=PATIENCE_S)


@pytest.mark.parametrize("question", [None, b"?", b"x" * 10_000_000], ids=["none", "short", "long"])
def test_closed_end_is_an_end(ends: Ends, question: bytes | None) -> None:
    asker, theirs = ends
    theirs.close()
    with pytest.raises(EOFError):
        asker.exchange(question, limit_s=PATIENCE_S)


def test_end_within_an_answer_is_an_end(ends: Ends) -> None:
    asker, theirs = ends
    theirs.sendall(framed(b"whole")[:-1])
    theirs.close()
    with pytest.raises(EOFError):
        asker.exchange(None, limit_s=PATIENCE_S)


def test_judge_s_end_notices_that_the_pool_is_gone(ends: Ends) -> None:
    asker, theirs = ends
    asker.close()
    with pytest.raises(EOFError):
        receive(theirs)
