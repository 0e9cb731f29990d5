"""Engines for the rollout tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.rollout.engines import push
from xrl.rollout import create_engine
from xrl.rollout.engine import Engine


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
