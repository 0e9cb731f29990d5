"""What listens at a worker's address and answers as a test says: an HTTP server in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from aiohttp import web

from tests.rollout.fleets import VOCAB_SIZE
from xrl.config import RolloutConfig
from xrl.rollout import protocol
from xrl.rollout.access import Access, new_key
from xrl.rollout.fleet import Fleet
from xrl.types import GenerateRequest, SamplingParams

Answer = Callable[[web.Request, GenerateRequest], Awaitable[web.StreamResponse]]
RUN = "a-run"
HEALTHY = {"status": "ok", "weights_version": 0, "num_running": 0, "max_requests": 64}


def good_answer(request: GenerateRequest, *, version: int = 0) -> list[dict[str, Any]]:
    """The prompt again, its last token being the one that stops: as the scripted engine answers."""
    ids = list(request.token_ids)
    return [
        {
            "output_ids": list(ids),
            "meta_info": {
                "prompt_tokens": len(ids),
                "completion_tokens": len(ids),
                "finish_reason": {"type": "stop"},
                "output_token_logprobs": [[-0.5 - place, token] for place, token in enumerate(ids)],
                "weights_version": version,
                "weights_run": RUN,
            },
        }
        for _ in range(request.num_samples)
    ]


def as_arrays(answers: list[dict[str, Any]], *, padding: int = 0) -> bytes:
    """What `good_answer` makes, or a test of it, as arrays: ids in int32 and log-probs in float32, little-endian.

    Args:
        padding: spaces in front of the header's JSON.
    """
    metas = [dict(one["meta_info"]) for one in answers]
    logprobs = [pair[0] for meta in metas for pair in meta.pop("output_token_logprobs")]
    ids = [token for one in answers for token in one["output_ids"]]
    header = b" " * padding + json.dumps(metas).encode()
    return struct.pack(f"<I{len(header)}s{len(ids)}i{len(logprobs)}f", len(header), header, *ids, *logprobs)


async def answer_well(_: web.Request, request: GenerateRequest) -> web.StreamResponse:
    return web.json_response(good_answer(request))


class AnsweringWorker:
    """Answers `/generate` by `answer`, and counts; says that it is well to everybody."""

    def __init__(self, answer: Answer = answer_well, *, health: Any = HEALTHY) -> None:
        self.answer, self.health = answer, health
        self.num_asked = 0
        self.told: list[str] = []  # paths of all other calls but those about its lease, in order
        self.says: dict[str, Any] = {}  # to calls of these paths, in the place of its health
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._listens = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._listens.wait(30)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._loop.run_forever()

    async def _start(self) -> None:
        application = web.Application()
        application.router.add_post(protocol.GENERATE, self._generate)
        application.router.add_route("*", "/{path:.*}", self._say_health)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        self._listens.set()

    async def _say_health(self, http: web.Request) -> web.StreamResponse:
        if http.path != protocol.LEASE:
            self.told.append(http.path_qs)
        if http.path in self.says:
            return web.json_response(self.says[http.path])
        return self.health if isinstance(self.health, web.StreamResponse) else web.json_response(self.health)

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        self.num_asked += 1
        body = await http.json()
        request = GenerateRequest(
            id=body["request_id"],
            token_ids=body["input_ids"],
            num_samples=body["n"],
            sampling=SamplingParams(max_new_tokens=body["max_tokens"], stop_token_ids=tuple(body["stop_token_ids"])),
        )
        return await self.answer(http, request)


@contextlib.contextmanager
def fleet_of(*workers: AnsweringWorker, **settings: Any) -> Iterator[Fleet]:
    """A fleet of workers that somebody else has started."""
    config = RolloutConfig(rollout_worker_urls=",".join(f"127.0.0.1:{worker.port}" for worker in workers), **settings)
    fleet = Fleet(
        config,
        model_dir=None,  # type: ignore[arg-type]
        dtype="float32",
        devices=[],
        num_threads=1,
        max_model_len=64,
        vocab_size=VOCAB_SIZE,
        log_dir=None,  # type: ignore[arg-type]
        access=Access(key=new_key(), run_id=RUN),
    )
    try:
        with fleet:
            yield fleet
    finally:
        for worker in workers:
            worker.close()
