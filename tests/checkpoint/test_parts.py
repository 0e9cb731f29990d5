"""Parts of a run give their state, and get it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from xrl.checkpoint.parts import give_states, take_states


class Part:
    def __init__(self, **state: Any) -> None:
        self.state: Mapping[str, Any] = state

    def state_dict(self) -> Mapping[str, Any]:
        return self.state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = state


def test_values_go_into_json_and_arrays_beside_it() -> None:
    ids = np.array([1, 2], dtype=np.int32)
    values, arrays = take_states({"data": Part(epoch=3, ids=ids), "other": Part(ids=ids + 1), "empty": Part()})
    assert json.loads(json.dumps(values)) == {"data": {"epoch": 3}, "other": {}, "empty": {}}
    assert {name: array.tolist() for name, array in arrays.items()} == {"data.ids": [1, 2], "other.ids": [2, 3]}


def test_each_part_gets_its_own_back_and_a_new_one_nothing() -> None:
    ids = np.array([1, 2], dtype=np.int32)
    values, arrays = take_states({"data": Part(epoch=3, ids=ids), "watch": Part(count=5)})
    data, watch, new = Part(), Part(), Part(untouched=True)
    give_states({"data": data, "watch": watch, "new": new}, values, arrays)
    assert data.state["epoch"] == 3
    assert data.state["ids"].tolist() == [1, 2]
    assert data.state["ids"].dtype == np.int32
    assert watch.state == {"count": 5}
    assert new.state == {"untouched": True}
