"""A worker's side of the transport for weights: the receiver of the run that connected last."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch

from xrl.rollout.engine import EngineNotReady
from xrl.weights.transport import Receiver, TransportError, create_receiver

# Whoever invites a worker says how long to wait for it. So many wait at once: others are asked to come again.
MAX_CONNECTING = 4
# Threads that wait although nobody does any more.
MAX_STUCK = 32
# For the transport, to say by itself what it waited for.
CONNECT_GRACE_S = 5.0


class Receivers:
    """Holds the receiver of the run that connected last. Used by one thread, the event loop's."""

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: where the engine is.
        """
        self._device = device
        self._receiver: Receiver | None = None
        self._run_id: str | None = None  # whose it is
        self._num_connecting = self._num_stuck = 0

    async def new(self, transport: str, invitation: Mapping[str, Any], *, timeout_s: float) -> Receiver:
        """Act on an invitation. The present receiver stays: who cannot connect takes it from nobody.

        Raises:
            ValueError: the invitation cannot be right.
            TransportError: nobody is there in time. torch waits for ever where a host says nothing.
            EngineNotReady: too many wait already.
        """
        if self._num_connecting == MAX_CONNECTING or self._num_stuck == MAX_STUCK:
            raise EngineNotReady(f"{self._num_connecting + self._num_stuck} other connects are under way")
        connecting = asyncio.wrap_future(
            _in_thread(lambda: create_receiver(transport, invitation, timeout_s=timeout_s, device=self._device))
        )
        self._num_connecting += 1
        try:
            return await asyncio.wait_for(asyncio.shield(connecting), timeout_s + CONNECT_GRACE_S)
        except TimeoutError:
            raise TransportError(f"the publisher has said nothing for {timeout_s:g} s") from None
        finally:
            self._num_connecting -= 1
            if not connecting.done():  # the caller is gone, or its time is up
                self._num_stuck += 1
                connecting.add_done_callback(self._is_unstuck)

    def install(self, receiver: Receiver, run_id: str) -> None:
        """Replace the present receiver, which must not be in use."""
        previous, self._receiver, self._run_id = self._receiver, receiver, run_id
        if previous is not None:
            previous.close()

    def of(self, run_id: str, *, part: str) -> Receiver:
        """The receiver, for a part of this run's weights.

        Raises:
            TransportError: the run has not connected.
        """
        if self._receiver is None or self._run_id != run_id:
            raise TransportError(f"no trainer of this run has connected before it sent {part}")
        return self._receiver

    def _is_unstuck(self, connecting: asyncio.Future[Receiver]) -> None:
        self._num_stuck -= 1
        if not connecting.cancelled() and connecting.exception() is None:
            connecting.result().close()  # Unbounded: it is done, and nobody else waits for it any more.


def _in_thread(create: Callable[[], Receiver]) -> Future[Receiver]:
    """In a thread that nobody waits for at the process's end: it may wait for somebody who never comes."""
    done: Future[Receiver] = Future()

    def settle() -> None:
        try:
            done.set_result(create())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=settle, name="connect", daemon=True).start()
    return done
