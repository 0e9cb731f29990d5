"""Rows of a parquet file, read in a process of its own.

pyarrow and `datasets` take memory (together about 150 MB) that a training process would hold to its end for a file that
is read once. The file is opened here, as a file: its path is no pattern for other files. What `datasets` wrote, it also
decodes, because it keeps some types under another one (JSON as text).

    python -P -m xrl.data.table FILE COLUMN...      batches of rows on stdout, pickled
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xrl.launch.children import child_environment, module_command
from xrl.launch.start import forgive_warnings_of_others

# For the next rows, the import of the libraries from a slow disk included.
LIMIT_S = 300.0
# A process whose output has ended, or that was killed, is gone at once.
_END_S = 10.0
# Rows handed over at once.
_BATCH = 1024


def read_table(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every row of a parquet file, in order, with those of the columns that the file has.

    Raises:
        ValueError: the file or a row cannot be read, or not in time, as the end of a sentence.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*module_command("xrl.data.table"), os.fspath(path), *columns],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=child_environment(),
            # Out of the terminal's process group: Ctrl-C reaches us, and we end it.
            process_group=0,
        )
        assert process.stdout is not None
        try:
            with process.stdout:
                while isinstance(batch := _receive(process), list):
                    yield from batch
        except GeneratorExit:  # nobody wants the rest
            process.kill()
            raise
        finally:
            _wait(process)
        if process.returncode:
            errors.seek(0)
            raise ValueError(f"cannot be read: its reader {_end(process.returncode, errors.read())}")
    if isinstance(batch, str):
        raise ValueError(batch)


def _receive(process: subprocess.Popen[bytes]) -> list[dict[str, Any]] | str | None:
    """The next batch, what is wrong with the file, or None: the process has ended."""
    assert process.stdout is not None
    timer = threading.Timer(LIMIT_S, process.kill)
    timer.daemon = True
    timer.start()
    try:
        # Pickled by our own code, of what pyarrow makes of a file: dates, bytes and decimals, which JSON has not.
        received: list[dict[str, Any]] | str = pickle.load(process.stdout)
    except (EOFError, pickle.UnpicklingError):  # the second where it was killed in the middle
        return None
    finally:
        timer.cancel()
    return received


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel
            process.wait(_END_S)


def _end(code: int, errors: bytes) -> str:
    """How the reader ended, in words."""
    if code == -signal.SIGKILL:
        return f"was ended by SIGKILL: it gave no rows for {LIMIT_S:g} s, or the machine has run out of memory"
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = [line for line in errors.decode(errors="replace").split("\n") if line.strip()]
    return f"{how}: {lines[-1]}" if lines else how


def _batches(path: str, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows, some at a time; raises ValueError as `read_table` does, OSError where there is no file to open."""
    import pyarrow.parquet

    # Opened by us, because pyarrow would want a name of UTF-8.
    with open(path, "rb") as opened:
        try:
            file = pyarrow.parquet.ParquetFile(opened)
            names = file.schema_arrow.names
            decode = _decoder(file.schema_arrow)
        except Exception as error:  # whatever the libraries meet in damaged files
            raise ValueError(f"is not a parquet file that can be read: {_reason(error)}") from error
        chosen = [name for name in columns if name in names]
        for name in chosen:
            if names.count(name) > 1:
                raise ValueError(f"has {names.count(name)} columns called {name}: one is needed")
        if not chosen:
            yield [{}] * file.metadata.num_rows
            return
        num_rows = 0
        batches = file.iter_batches(batch_size=_BATCH, columns=chosen)
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                rows = decode(batch)
            except Exception as error:
                raise ValueError(f"cannot be read behind row {num_rows}: {_reason(error)}") from error
            num_rows += len(rows)
            _shorten_truths(rows, file.schema_arrow)
            yield rows


def _decoder(schema: Any) -> Any:
    """What makes rows of a batch: pyarrow, or `datasets` where that wrote the file."""
    if b"huggingface" not in (schema.metadata or {}):
        return lambda batch: batch.to_pylist()
    import datasets
    import pyarrow

    datasets.Features.from_arrow_schema(schema)  # types of a newer version are met here, not at the first row
    return lambda batch: list(datasets.Dataset(pyarrow.Table.from_batches([batch])))


def _shorten_truths(rows: list[dict[str, Any]], schema: Any) -> None:
    """Make 0.1 of a ground truth of 32 or 16 bits, in place of 0.10000000149011612, which nobody answers."""
    import numpy
    import pyarrow.types

    narrow = {"float": numpy.float32, "halffloat": numpy.float16}
    for column, inner in (("ground_truth", None), ("reward_model", "ground_truth")):
        found: Any = schema.field(column).type if column in schema.names else None
        if inner is not None and found is not None:
            is_there = pyarrow.types.is_struct(found) and found.get_field_index(inner) >= 0
            found = found.field(inner).type if is_there else None
        if str(found) not in narrow:
            continue
        for row in rows:
            holder = row if inner is None else row[column]
            name = column if inner is None else inner
            if holder is not None and holder[name] is not None:
                holder[name] = float(str(narrow[str(found)](holder[name])))


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def main() -> None:
    # The rows alone go to stdout: whatever a library prints there would spoil them.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    forgive_warnings_of_others()
    path, *columns = sys.argv[1:]
    with out:
        try:
            for batch in _batches(path, columns):
                pickle.dump(batch, out)
        except (ValueError, OSError) as error:
            pickle.dump(str(error) if isinstance(error, ValueError) else f"cannot be read: {error.strerror}", out)


if __name__ == "__main__":
    main()
