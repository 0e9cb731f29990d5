"""What a state says of itself, and what is refused of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.states import manifest, write
from xrl.checkpoint.manifest import MANIFEST_FILE, FileRecord, Manifest, Unusable, check_files, rank_file, saved_steps
from xrl.parallel.layout import Place


def test_a_manifest_comes_back_from_its_file(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    found = Manifest.read(folder)
    assert found == manifest(3, files=found.files)
    assert [record.rank for record in found.files.values()] == [0, 1]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is no JSON"),
        ("[]", "has format None"),
        ('{"format": 0}', "has format 0, this version of xrl reads 1"),
        ('{"format": 1}', "is damaged: it has checksum [0-9a-f]+, it was written with None"),
        ('{"format": "1"}', "has format '1'"),
    ],
)
def test_another_file_is_refused_by_what_it_is(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(Unusable, match=sentence):
        Manifest.read(tmp_path)


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="manifest.json cannot be read: No such file"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("name", ["../config.yaml", "/etc/passwd", "a/b"])
def test_files_of_other_folders_are_never_looked_at(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 3, files={name: FileRecord(num_bytes=1, checksum="0", rank=0)})
    with pytest.raises(Unusable, match="is damaged: ValueError: file"):
        Manifest.read(folder)


def test_another_number_in_a_manifest_is_noticed(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    file = folder / MANIFEST_FILE
    file.write_text(file.read_text().replace('"num_updates": 6', '"num_updates": 7'))
    with pytest.raises(Unusable, match="is damaged: it has checksum"):
        Manifest.read(folder)


def test_a_file_that_is_missing_or_cut_is_named_with_its_rank(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    found = Manifest.read(folder)
    check_files(folder, found)
    (folder / "t1-p0-d0.safetensors").write_bytes(b"1234")
    with pytest.raises(Unusable, match=r"t1-p0-d0.safetensors, written by rank 1, has 4 bytes, .* with 5"):
        check_files(folder, found)
    (folder / "t1-p0-d0.safetensors").unlink()
    with pytest.raises(Unusable, match=r"t1-p0-d0.safetensors, written by rank 1, is missing"):
        check_files(folder, found)


def test_steps_are_those_of_folders_that_have_their_name(tmp_path: Path) -> None:
    assert saved_steps(tmp_path / "nowhere") == []
    for name in ("step-9", "step-10", ".step-11.partial", "step-12.damaged", "step-013", "step--1", "steps"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-99").write_text("a file")
    assert saved_steps(tmp_path) == [10, 9]


def test_each_rank_has_a_file_of_its_own() -> None:
    names = {rank_file(Place(tensor=t, pipeline=p, data=d, context=c)) for t in (0, 1) for p in (0, 1) for d in (0, 1)
             for c in (0, 1)}  # fmt: skip
    assert len(names) == 16
    assert rank_file(Place(tensor=1, pipeline=2, data=3)) == "t1-p2-d3.safetensors"
