"""The state of what is trained goes from one layout to any other and back, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks
from tests.tiny_models import make_checkpoint

WORKER = Path(__file__).with_name("state_worker.py")
VOCAB_SIZE = 98

DENSE = {
    "1 rank": (1,),
    "tp2pp2": (4, "--tp=2", "--pp=2"),
    "pp4": (4, "--pp=4"),
    "tp2dp2": (4, "--tp=2"),
    "dp2-distributed-optimizer": (2, "--distributed-optimizer"),
}
EXPERTS = {
    "1 rank": (1,),
    "ep2": (2, "--ep=2"),
    "tp2ep2-distributed-optimizer": (4, "--tp=2", "--ep=2", "--sp", "--distributed-optimizer"),
}

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    size = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 4}
    return {
        "dense": make_checkpoint(folder / "dense", family="qwen3", tied=True, **size),
        "experts": make_checkpoint(folder / "experts", family="qwen3_moe", **size),
    }


def run(layout: tuple, model: Path, folder: Path, name: str, load: Path | None = None) -> dict[str, float]:
    """Save a state at a layout, in folder/name; returns what the next update says."""
    num_ranks, *flags = layout
    out = folder / f"{name}.json"
    loaded = [f"--load={load}"] if load else []
    words = (f"--model={model}", f"--vocab-size={VOCAB_SIZE}", f"--save={folder / name}", f"--out={out}")
    run_ranks(WORKER, num_ranks, *words, *loaded, *flags)
    return json.loads(out.read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "step-1").iterdir()}


@pytest.mark.parametrize(
    ("kind", "first", "others"),
    [
        ("dense", "tp2pp2", ("1 rank", "pp4", "tp2dp2", "dp2-distributed-optimizer")),
        ("dense", "dp2-distributed-optimizer", ("1 rank", "pp4")),
        ("experts", "ep2", ("1 rank", "tp2ep2-distributed-optimizer")),
        pytest.param("experts", "tp2ep2-distributed-optimizer", ("1 rank",), marks=pytest.mark.cluster),
    ],
)
def test_a_state_comes_back_equal_from_every_other_layout(
    kind: str, first: str, others: tuple[str, ...], models: dict[str, Path], tmp_path: Path
) -> None:
    layouts, model = DENSE if kind == "dense" else EXPERTS, models[kind]
    straight = run(layouts[first], model, tmp_path, "saved")
    saved = contents(tmp_path / "saved")
    same = run(layouts[first], model, tmp_path, "again", tmp_path / "saved" / "step-1")
    assert contents(tmp_path / "again") == saved
    assert same == straight, "the next update, to the bit"
    for other in others:
        there = run(layouts[other], model, tmp_path, f"at {other}", tmp_path / "saved" / "step-1")
        for name, value in there.items():
            assert value == pytest.approx(straight[name], rel=1e-5, abs=1e-6), f"{name} of the next update at {other}"
        run(layouts[first], model, tmp_path, f"from {other}", tmp_path / f"at {other}" / "step-1")
        assert contents(tmp_path / f"from {other}") == saved, f"{first} -> {other} -> {first}"
