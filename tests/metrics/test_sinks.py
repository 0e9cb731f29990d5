"""Metrics on disk."""

from __future__ import annotations

import math
import struct
import subprocess
import sys

import pytest

from tests.files.limits import files_of_at_most
from xrl.metrics.run_folder import RunFolder
from xrl.metrics.sinks import JsonLinesSink, MetricsLog, TensorBoardSink, read_rows


def scalars(folder):
    """(step, name, value) of every scalar in a folder of TensorBoard events."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in folder.glob("events.out.tfevents.*"):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)  # length, its checksum, the event, its checksum
            event = Event.FromString(data[start + 12 : start + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            start += length + 16
    return found


def test_each_line_can_be_read_while_the_file_is_open(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(path)
    sink.write(1, {"loss": 0.5})
    assert read_rows(path) == [{"step": 1, "loss": 0.5}]
    sink.write(2, {"loss": 0.25})
    assert len(read_rows(path)) == 2
    sink.close()


def test_what_json_does_not_have_becomes_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(path)
    sink.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    sink.close()
    assert path.read_text() == '{"step": 1, "a": null, "b": null, "c": null, "d": 0.0}\n'


def test_a_second_sink_goes_on_after_the_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        sink = JsonLinesSink(path)
        sink.write(step, {})
        sink.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_a_last_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1}]


def test_a_broken_line_elsewhere_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\noops\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_rows(path)


def test_tensorboard_gets_every_finite_scalar(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(3, {"reward/mean": 0.5, "kl": math.nan})
    sink.write(4, {"reward/mean": 0.75})
    assert scalars(tmp_path) == [(3, "reward/mean", 0.5), (4, "reward/mean", 0.75)]  # before it is closed
    sink.close()


def test_a_run_writes_to_all_its_sinks(tmp_path):
    folder = RunFolder(tmp_path)
    with MetricsLog(folder) as log:
        log.write(1, {"loss": 0.5})
    assert read_rows(folder.metrics) == [{"step": 1, "loss": 0.5}]
    assert scalars(folder.tensorboard) == [(1, "loss", 0.5)]


def test_closing_twice_is_closing_once(tmp_path):
    log = MetricsLog(RunFolder(tmp_path))
    log.write(1, {"loss": 0.5})
    log.close()
    log.close()
    assert scalars(RunFolder(tmp_path).tensorboard) == [(1, "loss", 0.5)]


def test_tensorboard_can_be_switched_off_and_is_then_not_imported(tmp_path):
    code = (
        "import sys; from pathlib import Path; from xrl.metrics.run_folder import RunFolder; "
        "from xrl.metrics.sinks import MetricsLog; "
        "log = MetricsLog(RunFolder(Path(sys.argv[1])), tensorboard=False); log.write(1, {'loss': 0.5}); log.close(); "
        "sys.exit('tensorboardX' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_system_that_is_full_for_a_while_costs_no_step_and_tears_none(tmp_path):
    folder = RunFolder(tmp_path)
    log = MetricsLog(folder)
    log.write(1, {"loss": 0.5})
    for step, limit in enumerate((30, 45, 60), start=2):
        with files_of_at_most(limit):  # in the middle of a line and of an event
            log.write(step, {"loss": 0.5})
        assert folder.metrics.read_text().endswith("\n")
        assert read_rows(folder.metrics) and scalars(folder.tensorboard)
    log.write(5, {"loss": 0.5})
    assert [row["step"] for row in read_rows(folder.metrics)] == [1, 2, 3, 4, 5]
    assert [step for step, _, _ in scalars(folder.tensorboard)] == [1, 2, 3, 4, 5]


def test_what_waits_is_written_at_the_end(tmp_path):
    with MetricsLog(RunFolder(tmp_path)) as log, files_of_at_most(0):
        log.write(1, {"loss": 0.5})
    # The limit was lifted before the log was closed.
    assert [row["step"] for row in read_rows(RunFolder(tmp_path).metrics)] == [1]


def test_events_are_framed_as_tensorboard_reads_them(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(3, {"reward/mean": 0.5})
    data = sink.path.read_bytes()
    assert sink.path.name.startswith("events.out.tfevents.")
    from tensorboardX.record_writer import masked_crc32c

    start = 0
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        content = data[start + 12 : start + 12 + length]
        assert struct.unpack_from("<I", data, start + 8) == (masked_crc32c(data[start : start + 8]),)
        assert struct.unpack_from("<I", data, start + 12 + length) == (masked_crc32c(content),)
        start += length + 16
    assert b"brain.Event:2" in data
