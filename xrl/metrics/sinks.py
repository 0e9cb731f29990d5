"""Where metrics are written: JSON lines and TensorBoard events."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from xrl.metrics.run_folder import RunFolder


class Sink(Protocol):
    """Takes the metrics of one step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLinesSink:
    """One JSON object per line: `{"step": 3, "reward/mean": 0.5, ...}`.

    Each line is flushed, so that a crash loses none; a new sink on the same file goes on after its last line. NaN and
    infinities, which JSON does not have, become null.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {"step": step} | {name: _finite(value) for name, value in metrics.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """One scalar per metric; values that are not finite are left out. A step is on disk when `write` returns."""

    def __init__(self, folder: Path) -> None:
        # Imported here: it costs half a second, and runs without TensorBoard need not pay it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import Summary

        # Not SummaryWriter: it queues events for a thread, and its flush() does not wait for what is still queued.
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._event, self._summary = Event, Summary
        self._closed = False

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=float(value))
            for name, value in metrics.items()
            if math.isfinite(value)
        ]
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        # EventsWriter cannot be closed twice, files can.
        if not self._closed:
            self._writer.close()
        self._closed = True


class MetricsLog:
    """All the sinks of a run: `metrics.jsonl`, and TensorBoard events unless switched off."""

    def __init__(self, folder: RunFolder, *, tensorboard: bool = True) -> None:
        self._sinks: list[Sink] = [JsonLinesSink(folder.metrics)]
        if tensorboard:
            self._sinks.append(TensorBoardSink(folder.tensorboard))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step to every sink."""
        for sink in self._sinks:
            sink.write(step, metrics)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

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
