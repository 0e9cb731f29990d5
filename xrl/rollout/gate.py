"""What a worker serves: calls that show its key and name the run that has it. Everybody may ask for its health.

In this order: no web page, the key, the run, JSON. Nothing of a stranger's body is read.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Callable

from aiohttp import web

from xrl.rollout import protocol
from xrl.rollout.access import RUN_HEADER, AccessDenied, is_run_id
from xrl.rollout.lease import Lease

_PORT = re.compile(r":[0-9]*$")


class UnknownContent(Exception):
    """A body that is no JSON, or is packed: what unpacks to a thousand times its size is not read."""


class Gate:
    """Stands before every handler of a worker. Used by one thread."""

    def __init__(self, key: str, *, host: str, taken_over: Callable[[], None]) -> None:
        """
        Args:
            host: that the worker listens on.
            taken_over: is called when another run than before has the worker.
        """
        self.lease = Lease()
        self._key = key.encode()
        self._names = {host.lower(), "localhost", socket.gethostname().lower()}
        self._taken_over = taken_over

    def admit(self, http: web.BaseRequest) -> bool:
        """Let a call in, and its run have the worker; returns whether it showed the key.

        Raises:
            AccessDenied: it is a web page's, or a stranger's.
            WorkerInUse: another run has the worker.
            ValueError: it names no run.
            UnknownContent: its body is none that is read here.
        """
        if "Origin" in http.headers:
            raise AccessDenied("calls of web pages (with a header Origin) are not served")
        if not self._shows_key(http):
            self._check_stranger(http)
            return False
        if http.path == protocol.HEALTH:
            return True
        run_id = http.headers.get(RUN_HEADER, "")
        if not is_run_id(run_id):
            raise ValueError(f"the header {RUN_HEADER} must name the run, in 1 to 128 letters, digits or ._-")
        if http.path != protocol.LEASE and self.lease.take(run_id):
            self._taken_over()
        _check_content(http)
        return True

    def _shows_key(self, http: web.BaseRequest) -> bool:
        scheme, _, shown = http.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(shown.encode(errors="replace"), self._key)

    def _check_stranger(self, http: web.BaseRequest) -> None:
        if http.path != protocol.HEALTH or http.method not in ("GET", "HEAD"):
            raise AccessDenied(
                "the key is missing or wrong: workers started by hand and their trainers share a key file (xrl worker "
                "--key-file, xrl train --rollout-worker-key-file)"
            )
        # A web page can have its own name lead here: such a call comes without an Origin, but with that name.
        if not self._is_ours(http.headers.get("Host", "")):
            raise AccessDenied("without the key, health is told under an address of this host only")

    def _is_ours(self, host: str) -> bool:
        """Whether a header Host holds an address, or a name of this host's."""
        name = _PORT.sub("", host.lower()).strip("[]")
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _check_content(http: web.BaseRequest) -> None:
    if not http.content_length and "Transfer-Encoding" not in http.headers:
        return  # there is none
    if "Content-Encoding" in http.headers:
        raise UnknownContent("a body must come as it is, without a Content-Encoding")
    if "Content-Type" not in http.headers:
        return
    if http.content_type != "application/json" or (http.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise UnknownContent("a body must be application/json, in UTF-8")
