"""Where metrics are written: JSON lines and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from xrl.files.disk import NotWritten
from xrl.files.whole import WholeRecords, flush_to_disk
from xrl.metrics.gaps import LogGaps
from xrl.metrics.run_folder import RunFolder


class Sink(Protocol):
    """Takes the metrics of one step."""

    path: Path

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises NotWritten: the step is kept, and written with the next one or by `close`."""
        ...

    def close(self) -> None:
        """Write what could not be written before. Raises NotWritten."""
        ...


class JsonLinesSink:
    """One JSON object per line: `{"step": 3, "reward/mean": 0.5, ...}`.

    Each line is in the file, whole, when `write` returns, so that a crash loses none; a new sink on the same file goes
    on after its last line. NaN and infinities, which JSON does not have, become null.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = WholeRecords(path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {"step": step} | {name: _finite(value) for name, value in metrics.items()}
        self._lines.append(f"{json.dumps(row, allow_nan=False)}\n".encode())

    @property
    def num_bytes(self) -> int:
        """Written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, num_bytes: int) -> None:
        """Take back what was written behind the first so many bytes.

        Raises:
            NotWritten: it cannot be.
        """
        if not self.num_bytes:
            return
        try:
            kept = self.path.read_bytes()[:num_bytes]
            os.truncate(self.path, kept.rfind(b"\n") + 1)  # of a line that a crash has torn, too
        except OSError as error:
            raise NotWritten(self.path, error, num_bytes=0) from error

    def flush_to_disk(self) -> None:
        """Wait until it is there."""
        with contextlib.suppress(OSError):
            flush_to_disk(self.path)

    def close(self) -> None:
        self._lines.flush()


class TensorBoardSink:
    """One scalar per metric; values that are not finite are left out. A step is in the file when `write` returns."""

    def __init__(self, folder: Path) -> None:
        # Imported here: it costs half a second, and runs without TensorBoard need not pay it.
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import Summary

        # Not SummaryWriter, which queues events for a thread and does not say whether they could be written; nor
        # EventsWriter, which leaves half an event on a full disk, after which TensorBoard reads no other.
        self._event, self._summary, self._checksum = Event, Summary, masked_crc32c
        self._session, self._START = SessionLog, SessionLog.START
        began = time.time()
        self.path = folder / f"events.out.tfevents.{int(began)}.{socket.gethostname()}"
        version = Event(wall_time=began, file_version="brain.Event:2")
        self._events = WholeRecords(self.path, head=self._record(version.SerializeToString()), make_folder=True)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=float(value))
            for name, value in metrics.items()
            if math.isfinite(value)
        ]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._append(event)

    def begin_behind(self, step: int) -> None:
        """From here on steps are counted from behind this one: TensorBoard forgets later ones of earlier files."""
        self._append(self._event(wall_time=time.time(), step=step + 1, session_log=self._session(status=self._START)))

    def _append(self, event: Any) -> None:
        self._events.append(self._record(event.SerializeToString()))

    def close(self) -> None:
        self._events.flush()

    def _record(self, content: bytes) -> bytes:
        """The length, its checksum, the content, its checksum (tensorflow's TFRecord)."""
        length = struct.pack("<Q", len(content))
        return b"".join(
            (length, struct.pack("<I", self._checksum(length)), content, struct.pack("<I", self._checksum(content)))
        )


class MetricsLog:
    """All the sinks of a run: `metrics.jsonl`, and TensorBoard events unless switched off."""

    def __init__(self, folder: RunFolder, *, tensorboard: bool = True, gaps: LogGaps | None = None) -> None:
        """
        Args:
            gaps: of all logs of the run.
        """
        self._gaps = gaps or LogGaps()
        self._lines = JsonLinesSink(folder.metrics)
        self._events = TensorBoardSink(folder.tensorboard) if tensorboard else None
        self._sinks: list[Sink] = [self._lines, *([self._events] if self._events else [])]

    @property
    def num_bytes(self) -> int:
        """Of metrics.jsonl so far."""
        return self._lines.num_bytes

    def cut(self, num_bytes: int) -> None:
        """Take back what metrics.jsonl has behind its first so many bytes. Raises NotWritten."""
        self._lines.cut(num_bytes)

    def begin_behind(self, step: int) -> None:
        """Tell TensorBoard that steps behind this one come anew."""
        if self._events is not None:
            self._gaps.try_to(partial(self._events.begin_behind, step), self._events.path.name, self._events.path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step to every sink, or to none where nothing can be written: the run goes on."""
        for sink in self._sinks:
            self._gaps.try_to(partial(sink.write, step, metrics), sink.path.name, sink.path)

    def flush(self, *, to_disk: bool = False) -> None:
        """Write what could not be written before, as far as it can be now.

        Args:
            to_disk: and wait until metrics.jsonl is on the disk, whatever happens to the machine.
        """
        if to_disk:
            self._lines.flush_to_disk()
        for sink in self._sinks:
            self._gaps.try_to(sink.close, sink.path.name, sink.path)

    def close(self) -> None:
        """The same, at the end."""
        self.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file. A last line that a crash cut short is left out.

    Raises:
        ValueError: another line is not JSON, named by its number.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
