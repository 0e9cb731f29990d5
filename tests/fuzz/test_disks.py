"""Kills at any moment and disks that fill at any byte: what has its name is whole."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.files.limits import files_of_at_most
from tests.fuzz.conftest import Fuzz
from xrl.files.atomic_folder import remove_leftovers
from xrl.files.disk import NotWritten
from xrl.files.whole import WholeRecords, write_whole

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"hf-[0-9]+")
NUM_FILES = 30
# Writes a folder and removes the one before it, again and again.
WRITER = f"""
import sys
from itertools import count
from pathlib import Path
from xrl.files.atomic_folder import atomic_folder, remove_folder
below = Path(sys.argv[1])
for number in count(int(sys.argv[2])):
    with atomic_folder(below / f"hf-{{number}}") as partial:
        (partial / "inner").mkdir()
        for file in range({NUM_FILES}):
            (partial / "inner" / str(file)).write_bytes(bytes(1000))
    print(number, flush=True)
    if (below / f"hf-{{number - 1}}").exists():
        remove_folder(below / f"hf-{{number - 1}}")
"""


def test_a_folder_that_has_its_name_is_whole_whenever_its_writer_is_killed(fuzz: Fuzz, tmp_path: Path) -> None:
    rng = fuzz.random()
    kept: set[Path] = set()
    for case in range(fuzz.num_cases(8)):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(1000 * case)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()  # it is under way
            time.sleep(rng.uniform(0, 0.03))
            writer.kill()
        named = {path for path in tmp_path.iterdir() if NAME.fullmatch(path.name)}
        assert named > kept
        assert all(len(list((path / "inner").iterdir())) == NUM_FILES for path in named)
        remove_leftovers(tmp_path, NAME)
        # A folder that has lost its lock is whole, one that has none yet is empty; both are left.
        for hidden in [path for path in tmp_path.iterdir() if path not in named]:
            assert len(list(hidden.rglob("*"))) in (0, NUM_FILES + 1)
            shutil.rmtree(hidden)
        kept = named


def test_records_are_whole_and_in_order_wherever_a_disk_is_full(fuzz: Fuzz, tmp_path: Path) -> None:
    rng = fuzz.random()
    for case in range(fuzz.num_cases(50)):
        head = b"h" * rng.randrange(20)
        records = WholeRecords(tmp_path / f"log{case}", head=head)
        given: list[bytes] = []
        for number in range(rng.randrange(1, 12)):
            given.append(b"%d:%s\n" % (number, b"x" * rng.choice((0, 5, 100, 5000))))
            size = records.path.stat().st_size if records.path.exists() else 0
            limit = rng.choice((10**9, size, size + rng.randrange(200), size + rng.randrange(20000)))
            with contextlib.suppress(NotWritten), files_of_at_most(limit):
                records.append(given[-1])
            found = records.path.read_bytes() if records.path.exists() else b""
            assert found in (b"", *(head + b"".join(given[:count]) for count in range(1, len(given) + 1)))
        records.flush()
        assert records.path.read_bytes() == head + b"".join(given)


def test_a_file_is_the_old_or_the_new_one_wherever_a_disk_is_full(fuzz: Fuzz, tmp_path: Path) -> None:
    rng: random.Random = fuzz.random()
    path, old = tmp_path / "file", b""
    for _ in range(fuzz.num_cases(100)):
        new = rng.randbytes(rng.choice((0, 1, 4096, 70000)))
        limit = rng.randrange(100000)
        is_written = False
        with contextlib.suppress(NotWritten), files_of_at_most(limit):
            write_whole(path, new, flush=rng.random() < 0.1)
            is_written = True
        assert is_written == (len(new) <= limit)
        old = new if is_written else old
        assert (path.read_bytes() if path.exists() else b"") == old
        assert [entry.name for entry in tmp_path.iterdir()] in ([], ["file"])
