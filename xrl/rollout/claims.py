"""How a trainer has workers that somebody started to itself: claimed at the start, given back at the end.

A worker that another run has, or whose key is another one, is refused before anything else begins. Imports no torch.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp

from xrl.config.errors import SettingsError
from xrl.launch.terminal import printable
from xrl.rollout import protocol
from xrl.rollout.access import Access, AccessDenied, WorkerInUse, shared_key

KEY_FLAG = "--rollout-worker-key-file"
TIMEOUT_S = 2.0
# A worker's answer about its lease is a sentence.
MAX_ANSWER_BYTES = 2**16


def trainers_key(file: Path | None) -> str:
    """The key that a trainer shows to workers that somebody started.

    Raises:
        SettingsError: there is none, or others can read it.
    """
    return shared_key(file, flag=KEY_FLAG)


def ask(url: str, method: str, access: Access, *, timeout_s: float = TIMEOUT_S) -> tuple[int, dict[str, object]]:
    """What a worker answers to GET (could we have it?), POST (it is ours) or DELETE (no more) of its lease.

    Returns:
        The status and the answer; 0 and nothing where no worker answers.
    """
    try:
        return asyncio.run(_ask(url, method, access, timeout_s))
    except (OSError, ValueError, aiohttp.ClientError):  # time is up, too
        return 0, {}


async def _ask(url: str, method: str, access: Access, timeout_s: float) -> tuple[int, dict[str, object]]:
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    # Nothing that is answered there makes us show our key to somebody else, or unpack more than was sent.
    async with (
        aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session,
        session.request(method, url + protocol.LEASE, headers=access.headers, allow_redirects=False) as answer,
    ):
        text = b""
        async for piece in answer.content.iter_any():
            text += piece
            if len(text) > MAX_ANSWER_BYTES:
                break
        return answer.status, _object(text)


def check_answer(number: int, url: str, status: int, answer: dict[str, object]) -> bool:
    """Whether the worker is ours, or could be; False where none answers.

    Raises:
        SettingsError: it is not for us.
    """
    who = f"rollout worker {number} of --rollout-worker-urls, {url.removeprefix('http://')},"
    kind, sentence = answer.get("type"), printable(str(answer.get("error", "")))[:500]
    if kind == WorkerInUse.__name__:
        raise SettingsError(f"{who} is {sentence}")
    if kind == AccessDenied.__name__:
        raise SettingsError(
            f"{who} has another key: start it with `xrl worker --key-file FILE`, and train with {KEY_FLAG} and a copy "
            f"of the same file"
        )
    if status not in (0, 200):
        raise SettingsError(f"{who} answers with status {status}: it is no worker of this version of xrl")
    return status == 200


def _object(text: bytes) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
