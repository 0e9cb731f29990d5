"""`xrl doctor`: what each rank of a run is at, or was when the run ended because it hung."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from xrl.config import SettingsError
from xrl.config.json_file import read_json_object
from xrl.files.notes import Notes
from xrl.launch.beats import Beat
from xrl.launch.hang import Hang, RankReport
from xrl.launch.start import without_collections
from xrl.launch.watch import ASKED_KEY, BEAT_INTERVAL_S, REPORTS_LIMIT_S, Store, beat_key, report_key
from xrl.metrics.run_folder import RunFolder

CONNECT_LIMIT_S = 5.0
# A rank that beats has seen the question by then, and said where it is.
ANSWER_LIMIT_S = BEAT_INTERVAL_S + REPORTS_LIMIT_S
POLL_S = 0.2
# When a process was started is known as well as the clock was right then.
SAME_START_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Whereabouts:
    """Where a run's ranks are found, as rank 0 wrote it down."""

    world_size: int
    store: tuple[str, int] | None  # address and port; None: notes in the run's folder
    attempt: int  # of torchrun's
    host: str  # of rank 0
    pid: int
    started: float  # by the clock of its host, in seconds since 1970

    @classmethod
    def read(cls, file: Path) -> Whereabouts:
        """From `logs/ranks.json`.

        Raises:
            SettingsError: it is missing, or another file.
        """
        fields = read_json_object(file)
        try:
            store = fields["store"]
            return cls(
                world_size=int(fields["world_size"]),
                store=None if store is None else (str(store[0]), int(store[1])),
                attempt=int(fields["attempt"]),
                host=str(fields["host"]),
                pid=int(fields["pid"]),
                started=float(fields["started"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise SettingsError(f"{file} does not say where the ranks of a run are: {error}") from error

    @property
    def has_ended(self) -> bool:
        """Whether rank 0 is known to have: on this host only."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > SAME_START_S
        except psutil.Error:
            return True


def examine(path: Path) -> list[str]:
    """What is known of the ranks of the run in this folder, for people: a sentence, then a line a rank.

    Raises:
        SettingsError: it is no run's folder, or a run whose ranks cannot be asked and have left no report.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise SettingsError(f"RUN_DIR {path} is no run's folder: it has no {folder.config.name}")
    if not folder.ranks.is_file():
        name = folder.ranks.relative_to(path)
        raise SettingsError(f"RUN_DIR {path} has no {name}: the ranks of this run have not met yet, or never did")
    whereabouts = Whereabouts.read(folder.ranks)
    if whereabouts.has_ended:
        return _post_mortem(folder)
    return _ask(folder, whereabouts)


def _post_mortem(folder: RunFolder) -> list[str]:
    if not folder.hang.is_file():
        return ["the run has ended, and did not end because it hung"]
    fields = read_json_object(folder.hang)
    try:
        hang = Hang.from_fields(fields)
    except ValueError as error:
        raise SettingsError(f"{folder.hang}: {error}") from error
    return [f"the run has ended at {fields.get('time')}: {hang.sentence}", *hang.lines(most=len(hang.ranks))]


def _ask(folder: RunFolder, whereabouts: Whereabouts) -> list[str]:
    """Of ranks that run, or may."""
    if whereabouts.store is not None:
        _check_reachable(whereabouts.store)
    answers: dict[int, RankReport] = {}
    beats: dict[int, Beat] = {}
    # A client of a store on a link that is cut never returns, whatever its time-out.
    asking = threading.Thread(target=lambda: _gather(folder, whereabouts, answers, beats), daemon=True)
    start = time.monotonic()
    asking.start()
    asking.join(CONNECT_LIMIT_S + ANSWER_LIMIT_S + 1.0)
    waited_s = time.monotonic() - start
    reports = [
        answers.get(rank) or RankReport(rank=rank, beat=beats.get(rank), silent_s=waited_s)
        for rank in range(whereabouts.world_size)
    ]
    hang = Hang.of(None, reports)
    sentence = f"{len(answers)} of {len(reports)} ranks have answered within {waited_s:.0f} s"
    if len(answers) < len(reports):
        sentence += "; those that have not come first"
    elif len(reports) > 1:
        sentence += "; those that the others may wait for come first"
    return [sentence, *hang.lines(most=len(reports))]


def _gather(
    folder: RunFolder, whereabouts: Whereabouts, answers: dict[int, RankReport], beats: dict[int, Beat]
) -> None:
    """Ask every rank, and fill in who answers, and the last beats of the others."""
    with contextlib.suppress(RuntimeError, OSError, ValueError):  # who has not answered is silent
        store = _connect(folder, whereabouts)
        ranks = range(whereabouts.world_size)
        for rank in ranks:
            _fill(beats, rank, store, beat_key(rank), Beat.from_json)
        time_asked = store.add(ASKED_KEY, 1)
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while len(answers) < len(ranks) and time.monotonic() < deadline:
            for rank in ranks:
                if rank not in answers:
                    _fill(answers, rank, store, report_key(time_asked, rank), RankReport.from_json)
            time.sleep(POLL_S)


def _fill(into: dict[int, Any], rank: int, store: Store, key: str, parse: Callable[[bytes], Any]) -> None:
    if store.check([key]):
        into[rank] = parse(store.get(key))


def _check_reachable(address: tuple[str, int]) -> None:
    try:
        socket.create_connection(address, timeout=CONNECT_LIMIT_S).close()
    except OSError as error:
        raise SettingsError(
            f"the store of the run's ranks at {address[0]}:{address[1]} does not answer: {error.strerror or error}"
        ) from error


def _connect(folder: RunFolder, whereabouts: Whereabouts) -> Store:
    if whereabouts.store is None:
        return Notes(folder.doctor)
    with without_collections():
        # torch is slow to import: only for a run that can be asked.
        from xrl.parallel.store import ATTEMPT_VARIABLE, connect_to_store
    host, port = whereabouts.store
    address = {"MASTER_ADDR": host, "MASTER_PORT": str(port), ATTEMPT_VARIABLE: str(whereabouts.attempt)}
    return connect_to_store(address, timeout=timedelta(seconds=CONNECT_LIMIT_S))
