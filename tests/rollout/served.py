"""A worker in this process, around any engine, on a free port: as a worker process, but at once."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xrl.rollout.access import Access, new_key, new_run_id
from xrl.rollout.engine import Engine
from xrl.rollout.worker import serve

TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """Where the worker listens, and who may use it."""

    port: int
    access: Access

    def call(
        self,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        run_id: str | None = None,
    ) -> tuple[int, Any]:
        """Status and JSON of one call.

        Args:
            body: JSON, or bytes that are sent as they are.
            headers: in the place of those that show the key.
            run_id: another run's call, with the same key.
        """
        access = self.access if run_id is None else Access(key=self.access.key, run_id=run_id)
        content = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        with contextlib.closing(connection):
            connection.request(method, path, content, dict(access.headers if headers is None else headers))
            answer = connection.getresponse()
            text = answer.read()
        return answer.status, json.loads(text) if text else None


@contextlib.contextmanager
def served(engine: Engine, *, max_batch_size: int = 16, max_model_len: int = 64) -> Iterator[Served]:
    """The worker, for as long as the block takes."""
    access = Access(key=new_key(), run_id=new_run_id())
    ports: queue.Queue[int] = queue.Queue()

    loop = asyncio.new_event_loop()
    serving = serve(
        engine,
        key=access.key,
        host="127.0.0.1",
        port=0,
        device=torch.device("cpu"),
        max_batch_size=max_batch_size,
        max_model_len=max_model_len,
        announce=lambda *, port, max_requests: ports.put(port),
        stop_signals=(),
    )

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    task = loop.create_task(serving)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield Served(port=ports.get(timeout=TIMEOUT_S), access=access)
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(TIMEOUT_S)
