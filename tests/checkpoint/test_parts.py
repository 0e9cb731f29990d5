"""Parts of a run give their state, and get it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

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


def test_what_a_part_does_afterwards_is_not_in_its_state() -> None:
    ids, counts = np.array([1, 2], dtype=np.int32), {"a": 1}
    values, arrays = take_states({"data": Part(ids=ids, counts=counts)})
    ids[:] = 0
    counts["a"] = 5
    assert arrays["data.ids"].tolist() == [1, 2]
    assert values["data"] == {"counts": {"a": 1}}


def test_arrays_of_any_order_are_taken() -> None:
    _, arrays = take_states({"data": Part(table=np.arange(6).reshape(2, 3).T)})
    assert arrays["data.table"].is_contiguous()
    assert arrays["data.table"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_part_whose_state_cannot_be_said_is_named() -> None:
    with pytest.raises(RuntimeError, match="the state of algorithm holds what JSON cannot say"):
        take_states({"algorithm": Part(value=np.float32(1))})
