"""Engines for the rollout tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.rollout.engines import push
from tests.rollout.fleets import ENGINE, ROOT, VOCAB_SIZE, MakeFleet, bucket
from tests.rollout.warm_workers import WarmStarts
from xrl.config import RolloutConfig
from xrl.rollout import create_engine
from xrl.rollout.engine import Engine
from xrl.rollout.fleet import Fleet
from xrl.rollout.publish import WeightStream


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Builds embedded engines for a model, with its weights unless load=False; all are closed afterwards."""
    engines: list[Engine] = []

    def make(model: PreTrainedModel, *, load: bool = True, **options: Any) -> Engine:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path)
        settings = {"dtype": "float32", "device": "cpu", "max_batch_size": 64, "num_threads": 1, "max_model_len": 128}
        engine = create_engine("embedded", model_dir=tmp_path, **(settings | options))
        engines.append(engine)
        if load:
            push(engine, model)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def make_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeFleet]:
    """Starts fleets of the scripted engine, with weights unless update=False; all are closed afterwards.

    Their workers are forks of a process that has imported what they import.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if sys.platform == "linux":
        monkeypatch.setattr("xrl.rollout.process.subprocess", WarmStarts)
    fleets: list[Fleet] = []

    def make(num_workers: int = 1, *, engine: str = ENGINE, update: bool = True, **settings: object) -> Fleet:
        config = RolloutConfig(engine=engine, **settings)  # type: ignore[arg-type]
        fleet = Fleet(
            config,
            model_dir=tmp_path,
            dtype="float32",
            devices=["cpu"] * num_workers,
            num_threads=1,
            max_model_len=64,
            vocab_size=VOCAB_SIZE,
            log_dir=tmp_path,
        )
        fleets.append(fleet)
        if update:
            WeightStream(fleet).publish([bucket("layers.0", 1.0)], version=0)
        return fleet

    yield make
    for fleet in fleets:
        fleet.close()
