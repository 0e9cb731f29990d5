"""A data file as rows, read by `datasets` in a process of its own.

`datasets` brings pandas and pyarrow along, about 150 MB that a training process would hold to its end for a file that
is read once.

    python -m xrl.data.table text|parquet FILE     the rows on stdout, pickled
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from xrl.launch.children import child_environment, module_command


def read_table(kind: str, path: Path) -> list[dict[str, Any]]:
    """Every row of a file, in order.

    Args:
        kind: `text` (a row a line, in the field `text`) or `parquet`: the builder of `datasets`.

    Raises:
        ValueError: the file cannot be read, with the reason.
        RuntimeError: the process ended of something else; its output is shown.
    """
    process = subprocess.run(
        [*module_command("xrl.data.table"), kind, str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=child_environment(),
        # Out of the terminal's process group: Ctrl-C reaches us, and we end it.
        process_group=0,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"{path} could not be read: {process.stderr.decode(errors='replace')[-2000:]}")
    rows = pickle.loads(process.stdout)
    if isinstance(rows, str):
        raise ValueError(rows)
    return list(rows)


def _load(kind: str, path: str) -> list[dict[str, Any]] | str:
    """The rows, or why they cannot be read."""
    import datasets

    datasets.disable_progress_bars()
    # A cache of its own: the user's may be read-only or hold an older file's rows.
    with tempfile.TemporaryDirectory(prefix="xrl-data-") as cache:
        try:
            table = datasets.load_dataset(kind, data_files=path, split="train", cache_dir=cache, keep_in_memory=True)
            return list(table)
        except (datasets.exceptions.DatasetsError, ValueError) as error:
            return str(error.__cause__ or error)


def main() -> None:
    # The rows alone go to stdout: whatever a library prints there would spoil them.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with out:
        pickle.dump(_load(*sys.argv[1:]), out)


if __name__ == "__main__":
    main()
