"""A worker's connections: few of strangers, none for long; whatever HTTP itself refuses is said in JSON too."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from xrl.launch.terminal import printable

# A call begins as soon as its connection stands; this is for slow networks.
FIRST_CALL_S, LAST_CHANCE_S = 20.0, 1.0
# Between two calls. Trainers let go of a connection sooner.
IDLE_S = 75.0
# Of a body that was refused, for so long, so that the other side reads the answer before the connection breaks.
LINGER_S = 2.0
# What an error says of it at most.
MAX_ERROR_LENGTH = 500


class Strangers:
    """Connections on which no key was shown yet. The oldest one goes where there are too many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: dict[Connection, None] = {}  # in the order in which they came

    def add(self, connection: Connection) -> None:
        self._open[connection] = None
        while len(self._open) > self._most:
            next(iter(self._open)).force_close()
            self._open.pop(next(iter(self._open)))

    def remove(self, connection: Connection) -> None:
        self._open.pop(connection, None)


class Connection(RequestHandler):
    """One connection to a worker. It is a stranger's until `welcome`."""

    def __init__(self, server: web.Server, strangers: Strangers) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            keepalive_timeout=IDLE_S,
            lingering_time=LINGER_S,
            auto_decompress=False,
        )
        self._strangers = strangers
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._strangers.add(self)
        self._deadline = asyncio.get_running_loop().call_later(FIRST_CALL_S, self._is_late)

    def _is_late(self) -> None:
        # Where this process itself stood still, the call may be there by now, and is looked at next.
        self._deadline = asyncio.get_running_loop().call_later(LAST_CHANCE_S, self.force_close)

    def welcome(self) -> None:
        """The connection has shown the key."""
        self._strangers.remove(self)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def connection_lost(self, exc: BaseException | None) -> None:
        self.welcome()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is not HTTP, for example."""
        super().handle_error(request, status, exc, message)  # raises where an answer is on its way already
        return refusal(status, type(exc).__name__, message or str(exc or "it failed"), closes=True)

    def log_exception(self, *args: Any, **options: Any) -> None:
        """Log no traceback for a malformed request: its answer says what was wrong."""
        if not isinstance(options.get("exc_info"), HttpProcessingError):
            super().log_exception(*args, **options)

    async def finish_response(self, request: web.BaseRequest, resp: Any, start_time: Any) -> Any:
        """Finish the answer to an unknown path, for example."""
        if isinstance(resp, web.HTTPException):
            kept = {name: value for name, value in resp.headers.items() if name == "Allow"}
            resp = refusal(resp.status, type(resp).__name__, f"{request.method} {request.path}: {resp.reason}")
            resp.headers.update(kept)
        return await super().finish_response(request, resp, start_time)


def refusal(status: int, kind: str, sentence: str, *, closes: bool = False) -> web.Response:
    """The answer to a call that failed, in one line that can be shown anywhere.

    Args:
        closes: the connection, whatever else came on it.
    """
    response = web.json_response({"error": short_line(sentence), "type": kind}, status=status)
    if closes:
        response.force_close()
    return response


def short_line(text: str) -> str:
    """At most MAX_ERROR_LENGTH characters of a text, without what commands a terminal."""
    line = printable(" ".join(text[: 2 * MAX_ERROR_LENGTH].split()))
    return line if len(line) <= MAX_ERROR_LENGTH else f"{line[: MAX_ERROR_LENGTH - 3]}..."
