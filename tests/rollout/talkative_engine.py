"""A scripted engine that prints, from Python and beneath it, as libraries do."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import Any

from tests.rollout.scripted_engine import ScriptedEngine
from xrl.types import Completion, GenerateRequest


class TalkativeEngine(ScriptedEngine):
    """Has a word for its birth and for each request."""

    def submit(self, request: GenerateRequest) -> Future[list[Completion]]:
        print("asked", flush=True)
        return super().submit(request)


def make(**settings: Any) -> TalkativeEngine:
    print("born", flush=True)
    os.write(1, b"written\n")
    return TalkativeEngine(**settings)
