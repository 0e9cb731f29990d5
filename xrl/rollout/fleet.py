"""All rollout workers of a run, behind one face: started or claimed, asked, put to sleep, and ended on the way out.

Beneath it: `roster` knows who is ready, `client` talks to them, and `dispatch` spreads the requests of one rollout.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, overload

from xrl.config import RolloutConfig
from xrl.models.shape import read_model_shape
from xrl.rollout import protocol
from xrl.rollout.access import Access, new_key, new_run_id
from xrl.rollout.answers import StaleAnswer, WorkerFault, check_done, name_of
from xrl.rollout.claims import trainers_key
from xrl.rollout.client import Client
from xrl.rollout.dispatch import Answered, Dispatch, NoneReady, RolloutCounts
from xrl.rollout.process import RemoteWorker, WorkerGone, WorkerHandle, WorkerProcess
from xrl.rollout.roster import START_TIMEOUT_S, Roster
from xrl.types import Completion, GenerateRequest

__all__ = ["Fleet", "NoneReady", "RolloutCounts", "WorkerGone"]

STOP_TIMEOUT_S = 3.0
# Sleeping and waking move weights and caches, and build what the device computes with.
TURN_TIMEOUT_S = 120.0


class Fleet:
    """Starts workers, asks them, and ends them on the way out."""

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model_dir: Path,
        dtype: str,
        devices: Sequence[str],
        num_threads: int,
        max_model_len: int,
        log_dir: Path,
        vocab_size: int | None = None,
        access: Access | None = None,
    ) -> None:
        """
        Args:
            config: with `worker_addresses`, those workers are used and none is started.
            devices: torch device of each worker to start; their number is the number of workers.
            num_threads: CPU threads of each worker.
            max_model_len: longest prompt + response in tokens.
            log_dir: each worker's output goes to a file here.
            vocab_size: answers hold ids in [0, vocab_size); default: as the model's config.json says.
            access: who we are to the workers; default: a run of its own, with a key of its own or, for workers that
                somebody started, with that of their file.
        """
        self.config = config
        vocab_size = read_model_shape(model_dir).vocab_size if vocab_size is None else vocab_size
        self.access = access or Access(
            key=trainers_key(config.rollout_worker_key_file) if config.worker_addresses else new_key(),
            run_id=new_run_id(log_dir.parent.name),
        )
        arguments = [
            f"--engine={config.engine}",
            f"--model={model_dir}",
            f"--dtype={dtype}",
            f"--max-batch-size={config.rollout_max_batch_size}",
            f"--num-threads={num_threads}",
            f"--max-model-len={max_model_len}",
            f"--num-workers-on-host={len(devices)}",
            *([] if config.rollout_kv_cache_gb is None else [f"--kv-cache-gb={config.rollout_kv_cache_gb}"]),
        ]
        self.workers: list[WorkerHandle] = [
            RemoteWorker(number, host, port, access=self.access)
            for number, (host, port) in enumerate(config.worker_addresses)
        ]
        self.workers = self.workers or [
            WorkerProcess(
                number,
                [*arguments, f"--device={device}"],
                key=self.access.key,
                num_threads=num_threads,
                log=log_dir / f"rollout_worker_{number}.log",
                python=config.rollout_python,
            )
            for number, device in enumerate(devices)
        ]
        self.roster = Roster(self.workers, config)
        self.client = Client(self.access, vocab_size=vocab_size, num_workers=len(self.workers))
        self._has_started = False
        self._dispatch: Dispatch | None = None  # of the last call of `generate`

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every worker that was started here, whatever state it is in; give the others back."""
        self.roster.close(STOP_TIMEOUT_S)
        self.client.stop_keeping()
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.join(STOP_TIMEOUT_S)
        self.client.close(STOP_TIMEOUT_S)

    @property
    def version(self) -> int | None:
        """Of the weights that a ready worker has; None before the first update."""
        return self.roster.version

    @property
    def num_lost(self) -> int:
        """Workers lost since the start, each as often as it was."""
        return self.roster.num_lost

    @property
    def num_restarted(self) -> int:
        """Workers started again since the start, each as often as it was."""
        return self.roster.num_restarted

    @property
    def headers(self) -> Mapping[str, str]:
        """What every call of a worker shows, for calls by hand."""
        return self.access.headers

    def claim(self) -> None:
        """Workers that somebody started are this run's from now on, those that answer by now; `close` gives them back.

        Raises:
            SettingsError: another run has one, or its key is another one.
        """
        for worker in self.workers:
            worker.claim()
        self.client.keep([worker for worker in self.workers if not worker.is_ours])

    def wait_until_ready(self) -> None:
        """At the start: wait until every worker listens.

        Raises:
            WorkerGone: one ended or did not start in time.
            WorkerFault: what is at its address is no worker.
        """
        if self._has_started:
            return
        self.claim()
        for worker in self.workers:
            worker.wait_until_listening(START_TIMEOUT_S)
        self._has_started = True

    def ready(self) -> list[WorkerHandle]:
        """Workers that requests can be sent to; none where none is left."""
        return self.roster.ready()

    def none_left(self) -> WorkerGone:
        """The error that says so, with what each worker was lost by last."""
        return self.roster.none_left()

    def reachable(self) -> list[WorkerHandle]:
        """Workers that listen, whatever weights they have; waits for one to start where there is none.

        Raises:
            WorkerGone: none listens and none starts; at the start, one did not.
            WorkerFault: at the start, what is at an address is no worker.
        """
        self.wait_until_ready()
        return self.roster.reachable()

    @overload
    def generate(
        self,
        requests: Sequence[GenerateRequest],
        counts: RolloutCounts,
        *,
        updates: Literal[False] = False,
        while_waiting: Callable[[], None] = ...,
    ) -> Iterator[Answered]: ...

    @overload
    def generate(
        self,
        requests: Sequence[GenerateRequest],
        counts: RolloutCounts,
        *,
        updates: bool,
        while_waiting: Callable[[], None] = ...,
    ) -> Iterator[Answered | NoneReady]: ...

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        counts: RolloutCounts,
        *,
        updates: bool = False,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> Iterator[Answered | NoneReady]:
        """Yield each request's place and completions as they finish; None for one whose tries are spent.

        Requests still running when the iterator is closed are aborted.

        Args:
            updates: whoever iterates can publish the weights anew. NoneReady is yielded, beside the answers, when no
                worker is ready and one that is started again, or has other weights, could be with those of an update.
                The rollout goes on with the call for the next value: publish before that. Without it, the loss of the
                last ready worker is the end.
            while_waiting: called again and again; what it raises ends the rollout, and is raised here.

        Raises:
            WorkerGone: the last worker died.
        """
        self.wait_until_ready()
        dispatch = self._dispatch = Dispatch(self.roster, self.client, self.config, counts, updates=updates)
        running = self.client.start(dispatch.run(requests))
        num_left = len(requests)
        try:
            while num_left:
                result = dispatch.next_result(while_waiting)
                num_left -= not isinstance(result, NoneReady)
                yield result
        finally:
            running.cancel()

    def waits_for(self) -> str:
        """Which workers have not answered yet and for how long: for people, from any thread."""
        return self.client.waits_for()

    def cut_short(self) -> None:
        """End the rollout that `generate` is at: what is left of it comes back at once, as it is."""
        if self._dispatch is not None:
            self.client.start(self._dispatch.cut_short())

    def ask_all(self, request: GenerateRequest, *, timeout_s: float) -> list[tuple[WorkerHandle, list[Completion]]]:
        """Every ready worker's completions; one that does not answer, or wrongly, is lost. None where none is ready.

        Raises:
            WorkerRefused: a worker cannot.
            WorkerGone: one is lost, and `on_lost_worker` is "stop".
        """

        async def ask(worker: WorkerHandle) -> tuple[WorkerHandle, list[Completion]] | None:
            generation = self.roster.generation(worker)
            try:
                return worker, await self.client.completions(worker, request, version=self.version, timeout_s=timeout_s)
            except StaleAnswer as error:
                self.roster.mark_stale(worker, error.versions)
            except WorkerFault as error:
                self.roster.lose(worker, error.detail, generation=generation)
            except (WorkerGone, TimeoutError) as error:
                self.roster.lose(worker, str(error), generation=generation)
            return None

        async def ask_everyone() -> list[tuple[WorkerHandle, list[Completion]] | None]:
            return await asyncio.gather(*map(ask, self.ready()))

        answers = self.client.wait_for(ask_everyone(), timeout_s=timeout_s, doing=f"answers to {request.id}")
        return [answer for answer in answers if answer is not None]

    def sleep(self) -> None:
        """Have every worker give its device to the actor, weights and all: an update comes before the next request.

        Waits for workers that are starting: they must not take the device while the actor uses it.

        Raises:
            WorkerRefused: a worker cannot.
            WorkerGone: no worker is left.
        """
        while self.roster.is_any_starting:  # START_TIMEOUT_S at most
            time.sleep(0.1)
        self._tell_all(f"{protocol.SLEEP}?level=2")

    def wake(self) -> None:
        """The opposite: each engine takes what memory it wants. Raises as `sleep`."""
        self._tell_all(protocol.WAKE)

    def _tell_all(self, path: str) -> None:
        async def tell(worker: WorkerHandle) -> None:
            generation = self.roster.generation(worker)
            try:
                answer = await self.client.post(worker, path, {}, timeout_s=TURN_TIMEOUT_S)
                check_done(answer, worker=name_of(worker))
            except WorkerFault as error:
                self.roster.lose(worker, f"{path}: {error.detail}", generation=generation)
            except (WorkerGone, TimeoutError) as error:
                self.roster.lose(worker, str(error), generation=generation)

        async def tell_everyone() -> None:
            await asyncio.gather(*map(tell, workers))

        workers = self.reachable()
        self.client.wait_for(tell_everyone(), timeout_s=TURN_TIMEOUT_S, doing=path)
