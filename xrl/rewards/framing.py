"""Messages over a socket: four bytes that say how long it is, then the message. None is waited for without an end.

The other end may be anyone's code. It may write half a message, a wrong length or too much, speak without being asked,
not read, or write a byte a second: each costs the time that one answer may take, at most, and ends as an exception.
"""

from __future__ import annotations

import math
import select
import socket
import struct
import time

_LENGTH = struct.Struct("!I")
# What a question may hold: an answer, its prompt and the row's extra_info.
MAX_QUESTION_BYTES = 1 << 30
# Verdicts are a few short texts.
MAX_ANSWER_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 16
# The system counts milliseconds in 32 bits.
_LONGEST_POLL_MS = 1_000_000


class BadMessage(ValueError):
    """What came is not what the protocol allows; says how, as the end of a sentence."""


class Asker:
    """The asking end of a socket whose other end is not trusted."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._poll = select.poll()
        self._poll.register(end, select.POLLIN)
        self._awaits_room = False  # whether the poll is for writing too

    def exchange(self, message: bytes | None, *, limit_s: float) -> bytes:
        """Send a message and return the one that answers it.

        Args:
            message: None where the other end speaks first.
            limit_s: for all of it. What has arrived by then counts, also where this process was itself stopped.

        Raises:
            TimeoutError: no whole answer in time, or the question was not read in time; the message says which.
            BadMessage: something else came than one answer of at most MAX_ANSWER_BYTES.
            EOFError: the other end is closed.
        """
        deadline = time.monotonic() + limit_s
        unsent = memoryview(b"")
        if message is not None:
            self._refuse_unasked()
            unsent = memoryview(_framed(message))
        received = bytearray()
        try:
            while True:
                if unsent:
                    unsent = unsent[self._send(unsent) :]
                if not self._wait(deadline, sends=bool(unsent)):
                    raise TimeoutError(_too_late(has_all=not unsent, has_begun=bool(received)))
                chunk = self._receive()
                if chunk is None:
                    continue
                if not chunk:
                    raise EOFError
                if unsent:
                    raise BadMessage("it answered before it had read the question")
                received += chunk
                if (answer := _whole(received)) is not None:
                    return answer
        except TimeoutError:
            raise
        except OSError as error:
            raise EOFError from error

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _refuse_unasked(self) -> None:
        chunk = self._receive()
        if chunk is None:
            return
        if not chunk:
            raise EOFError
        raise BadMessage("it wrote something without being asked")

    def _send(self, data: memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    def _receive(self) -> bytes | None:
        """What is there; empty at the end, None where nothing is."""
        try:
            # Unbounded: it never waits, as the socket does not block.
            return self._socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return None
        except ConnectionError:
            return b""

    def _wait(self, deadline: float, *, sends: bool) -> bool:
        """Until something can be read, or written; False when the time is up and nothing can."""
        if sends != self._awaits_room:
            self._awaits_room = sends
            self._poll.modify(self._socket, select.POLLIN | (select.POLLOUT if sends else 0))
        while True:
            left_ms = math.ceil((deadline - time.monotonic()) * 1000)
            if self._poll.poll(min(max(0, left_ms), _LONGEST_POLL_MS)):
                return True
            if left_ms <= _LONGEST_POLL_MS:
                return False


def send(end: socket.socket, message: bytes) -> None:
    """Send a message to the asking end, which reads it or goes.

    Raises:
        OSError: the other end is closed.
    """
    end.sendall(_framed(message))


def receive(end: socket.socket, *, max_bytes: int = MAX_QUESTION_BYTES) -> bytes:
    """The next message from the asking end, which is trusted.

    Raises:
        EOFError: the other end is closed.
    """
    (length,) = _LENGTH.unpack(_exactly(end, _LENGTH.size))
    if length > max_bytes:
        raise EOFError
    return _exactly(end, length)


def _exactly(end: socket.socket, num_bytes: int) -> bytes:
    received = bytearray(num_bytes)
    view = memoryview(received)
    while view:
        # Unbounded: the asking end is closed when its process ends, and that ends the wait.
        count = end.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(received)


def _framed(message: bytes) -> bytes:
    return _LENGTH.pack(len(message)) + message


def _whole(received: bytearray) -> bytes | None:
    """The message, where all of it is there."""
    if len(received) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(received)
    if length > MAX_ANSWER_BYTES:
        raise BadMessage(f"it began a message of {length} bytes, more than {MAX_ANSWER_BYTES}")
    if len(received) > _LENGTH.size + length:
        raise BadMessage("it wrote more than one message")
    return bytes(received[_LENGTH.size :]) if len(received) == _LENGTH.size + length else None


def _too_late(*, has_all: bool, has_begun: bool) -> str:
    if not has_all:
        return "it did not read the question"
    return "its answer was not whole" if has_begun else ""
