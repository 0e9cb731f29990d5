"""The actor's new weights into every rollout worker, one part of the model at a time, each proven by its checksum.

One part: its manifest goes to each worker as JSON, its bytes through the transport. The worker answers with the
checksum of what it got, and loads it if that is the manifest's. Where the transport keeps a copy of a part, the next
one is gathered from the ranks while the workers take it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeAlias

import torch

from xrl.launch.exit import RunFailed
from xrl.rollout import protocol
from xrl.rollout.answers import (
    WeightsId,
    WorkerFault,
    WorkerRefused,
    check_done,
    check_updated,
    checked_checksum,
    name_of,
)
from xrl.rollout.fleet import Fleet
from xrl.rollout.process import WorkerGone, WorkerHandle
from xrl.types import WeightBucket
from xrl.weights.checksum import bucket_checksum
from xrl.weights.shared_export import ProvenBucket
from xrl.weights.transport import Manifest, TransportError, create_sender, shared_memory

logger = logging.getLogger("xrl")

# A part whose bytes arrive changed is sent so many times in all.
MAX_TRIES = 2
# What is done with one worker.
Action: TypeAlias = Callable[[WorkerHandle], Awaitable[None]]


class CorruptedWeights(RunFailed):
    """A part arrived with other bytes than were sent, every time."""


class NoneUpdated(WorkerGone):
    """Every worker was lost over an update. Those that are started again, or answer again, can take it anew."""


@dataclass(frozen=True, kw_only=True)
class PublishReport:
    """One update of all workers."""

    seconds: float
    num_bytes: int
    num_tensors: int
    num_workers: int  # that took it whole
    num_parts: int  # buckets whose checksum every one of these workers confirmed
    num_resent: int  # buckets that had to be sent to a worker again
    checksums: tuple[str, ...]  # of the parts, in order: equal where no weight has changed


@dataclass(frozen=True, kw_only=True)
class _Parcel:
    name: str  # for errors
    bucket: WeightBucket
    manifest: Manifest


class WeightStream:
    """Streams weight buckets to the fleet's workers. Memory beside the model: two buckets."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        timeout_s: float | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        """
        Args:
            timeout_s: longest that a worker may take over a part; left out: as the fleet's settings say.
            device: where the weights are.
        """
        config = fleet.config
        self.fleet = fleet
        self.roster, self.client = fleet.roster, fleet.client
        self.timeout_s = config.weight_sync_timeout_s if timeout_s is None else timeout_s
        self.transport = config.chosen_transport
        self._sender = create_sender(self.transport, timeout_s=self.timeout_s, device=device)
        self._connected: dict[int, int] = {}  # worker -> its generation that was connected
        self._taking: dict[int, list[str]] = {}  # worker -> parts it was told of and has not confirmed, in order
        self._under_way: list[Future[None]] = []  # in the client's thread, of this update
        self._num_resent = 0

    def publish(self, buckets: Iterable[WeightBucket], *, version: int) -> PublishReport:
        """Send every bucket; completions sampled from then on carry `version`.

        A worker that dies or does not take a part in time is lost, and named with the part; the others go on, or the
        run stops, as `on_lost_worker` says.

        Args:
            buckets: consumed in order, to the end, once. Each must stay as it is until the next one is asked for, and a
                ProvenBucket, which is sent from where it lies, until the next but one is.

        Raises:
            CorruptedWeights: a part's checksum was wrong twice.
            WorkerRefused: a worker refused a part: names both.
            NoneUpdated: all workers were lost meanwhile. `buckets` may not have come to their end.
            WorkerGone: no worker is left, or one is lost and `on_lost_worker` is "stop".
        """
        start = time.perf_counter()
        self._num_resent = num_bytes = num_tensors = num_parts = 0
        workers = {worker.number: worker for worker in self.fleet.reachable()}
        self._taking = {number: [] for number in workers}
        if self.memory is not None:
            self.memory.restart()
        for left in self._under_way:  # of an update that came to nothing
            left.cancel()
        self._under_way = []
        name = f"weights version {version}"
        self._end_of(self._begin(self._to_all(workers, self._connect, f"{name}: connecting")), name)
        sending: Future[None] | None = None
        checksums: list[str] = []
        for bucket in buckets:
            where = self._sender.put(bucket)
            checksum = bucket.checksum if isinstance(bucket, ProvenBucket) else bucket_checksum(bucket.tensors)
            manifest = Manifest.of(bucket, where=where, checksum=checksum)
            parcel = _Parcel(name=f"{name}, {bucket.part}", bucket=bucket, manifest=manifest)
            if sending is not None and self._sender.pushes:
                self._end_of(sending, name)
            # Workers that fetch the bytes themselves are told of a part while they take the one before.
            following = self._begin(self._send_to_all(workers, parcel))
            if sending is not None:
                self._end_of(sending, name)
            sending = following
            if not self._sender.keeps_copy:
                self._end_of(sending, name)
            checksums.append(checksum)
            num_parts += 1
            num_tensors += len(bucket.tensors)
            num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in bucket.tensors.values())
        if sending is not None:
            self._end_of(sending, name)
        self._end_of(self._begin(self._finish(workers, version)), name)
        self.roster.updated({number: self._connected[number] for number in workers}, version)
        if not self.roster.ready():
            raise NoneUpdated(f"{name}: no rollout worker has it")
        return PublishReport(
            seconds=time.perf_counter() - start,
            num_bytes=num_bytes,
            num_tensors=num_tensors,
            num_workers=len(workers),
            num_parts=num_parts,
            num_resent=self._num_resent,
            checksums=tuple(checksums),
        )

    @property
    def memory(self) -> shared_memory.Sender | None:
        """Where ranks of this host may write buckets themselves; None with another transport."""
        return self._sender if isinstance(self._sender, shared_memory.Sender) else None

    def close(self) -> None:
        """Free what the transport holds."""
        self._sender.close()

    def _begin(self, coroutine: Coroutine[object, object, None]) -> Future[None]:
        self._under_way.append(self.client.start(coroutine))
        return self._under_way[-1]

    def _end_of(self, running: Future[None], name: str) -> None:
        """Wait for what was begun: each try of a part has a time-out, twice as long where it waits for the one before.

        Raises:
            RunFailed: it does not end.
        """
        self.client.result_of(running, timeout_s=2 * MAX_TRIES * self.timeout_s, doing=name)

    async def _send_to_all(self, workers: dict[int, WorkerHandle], parcel: _Parcel) -> None:
        async def send(worker: WorkerHandle) -> None:
            await self._send(worker, parcel)

        await self._to_all(workers, send, parcel.name)

    async def _finish(self, workers: dict[int, WorkerHandle], version: int) -> None:
        weights = WeightsId(run_id=self.client.access.run_id, version=version)

        async def finish(worker: WorkerHandle) -> None:
            body = {"version": weights.version}
            answer = await self.client.post(worker, protocol.FINISH_UPDATE, body, timeout_s=self.timeout_s)
            check_updated(answer, weights, worker=name_of(worker))

        await self._to_all(workers, finish, f"weights version {version}")

    async def _to_all(self, workers: dict[int, WorkerHandle], action: Action, doing: str) -> None:
        """Do it with every worker at once; those that are lost by it are taken out of `workers`.

        Raises:
            WorkerRefused: a worker refused; `doing` begins the sentence.
            NoneUpdated: none is left.
        """

        async def attempt(worker: WorkerHandle) -> None:
            generation = self.roster.generation(worker)
            try:
                await action(worker)
            except (WorkerGone, WorkerFault, TransportError, TimeoutError) as error:
                if workers.pop(worker.number, None) is None:
                    return  # it was lost over another part
                self._disconnect(worker)
                # Of two parts under way either may fail first; it is the earlier one that the worker was at.
                at = self._taking[worker.number][0] if self._taking[worker.number] else doing
                what = error.detail if isinstance(error, WorkerFault) else str(error)
                self.roster.lose(worker, f"{at}: {what or 'no answer in time'}", generation=generation)
            except WorkerRefused as error:
                raise WorkerRefused(f"{doing}: {name_of(worker)}", error.detail) from error

        await asyncio.gather(*(attempt(worker) for worker in list(workers.values())))
        if not workers:
            raise NoneUpdated(f"{doing}: all rollout workers were lost")

    async def _connect(self, worker: WorkerHandle) -> None:
        generation = self.roster.generation(worker)
        if self._connected.get(worker.number) == generation:
            return
        self._disconnect(worker)
        body = {
            "transport": self.transport,
            "invitation": self._sender.invite(worker.number, worker.host),
            "timeout_s": self.timeout_s,
        }
        answer = await _both(
            self.client.post(worker, protocol.CONNECT, body, timeout_s=self.timeout_s),
            asyncio.to_thread(self._sender.accept, worker.number),
        )
        check_done(answer, worker=name_of(worker))
        self._connected[worker.number] = generation

    def _disconnect(self, worker: WorkerHandle) -> None:
        self._connected.pop(worker.number, None)
        self._sender.disconnect(worker.number)

    async def _send(self, worker: WorkerHandle, parcel: _Parcel) -> None:
        self._taking[worker.number].append(parcel.name)
        for attempt in range(1, MAX_TRIES + 1):
            manifest = parcel.manifest.to_json()
            if self._sender.pushes:
                told = self.client.post(worker, protocol.LOAD_PART, manifest, timeout_s=self.timeout_s)
                sent = asyncio.to_thread(self._sender.send, worker.number, parcel.bucket)
                answer = await _both(told, sent)
            else:
                # It may be at the part before.
                answer = await self.client.post(worker, protocol.LOAD_PART, manifest, timeout_s=2 * self.timeout_s)
            checksum = checked_checksum(answer, worker=name_of(worker))
            if checksum == parcel.manifest.checksum:
                self._taking[worker.number].remove(parcel.name)
                return
            logger.error(
                "%s: rollout worker %d got bytes with checksum %s instead of %s (try %d of %d)",
                parcel.name,
                worker.number,
                checksum,
                parcel.manifest.checksum,
                attempt,
                MAX_TRIES,
            )
            self._num_resent += attempt < MAX_TRIES
        raise CorruptedWeights(
            f"{parcel.name}: rollout worker {worker.number} got other bytes than were sent, {MAX_TRIES} times in a row "
            f"(--weight-transport {self.transport}): check the memory and the network of its host"
        )


async def _both(control: Awaitable[object], data: Awaitable[None]) -> object:
    """A call over the control connection and what goes with it through the transport.

    Returns the call's answer. Its error is the one to report, but for a worker that merely does not answer: the
    transport knows more.
    """
    answer, sent = await asyncio.gather(control, data, return_exceptions=True)
    errors = [each for each in (answer, sent) if isinstance(each, BaseException)]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, TimeoutError))
    return answer
