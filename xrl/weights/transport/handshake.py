"""Two sides of a connection prove to each other that they know a secret, without saying it.

A connection of gloo or NCCL is whoever's was first: before weights go over it, each side answers a question of the
other's that was never asked before. Nothing is encrypted: who reads the network reads the weights.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable

from xrl.weights.transport import TransportError

QUESTION_BYTES = 32
ANSWER_BYTES = hashlib.sha256().digest_size


def ask_and_answer(secret: bytes, *, send: Callable[[bytes], None], receive: Callable[[int], bytes]) -> None:
    """The inviting side: asks first, answers last.

    Args:
        send: brings bytes to the other side.
        receive: waits for so many of its bytes.

    Raises:
        TransportError: the other side does not know the secret.
    """
    question = secrets.token_bytes(QUESTION_BYTES)
    send(question)
    reply = receive(QUESTION_BYTES + ANSWER_BYTES)
    theirs, answer = reply[:QUESTION_BYTES], reply[QUESTION_BYTES:]
    _check(answer, _answer(secret, b"invited", question, theirs))
    send(_answer(secret, b"inviting", theirs, question))


def answer_and_ask(secret: bytes, *, send: Callable[[bytes], None], receive: Callable[[int], bytes]) -> None:
    """The invited side: answers first, asks with the same words. Arguments and errors as for `ask_and_answer`."""
    theirs = receive(QUESTION_BYTES)
    question = secrets.token_bytes(QUESTION_BYTES)
    send(question + _answer(secret, b"invited", theirs, question))
    _check(receive(ANSWER_BYTES), _answer(secret, b"inviting", question, theirs))


def _answer(secret: bytes, side: bytes, question: bytes, own_question: bytes) -> bytes:
    """The side is part of it: an answer cannot be sent back as one's own."""
    return hmac.digest(secret, side + question + own_question, "sha256")


def _check(found: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise TransportError("the other side of the connection for weights is not who was invited")
