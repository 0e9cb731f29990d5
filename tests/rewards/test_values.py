"""What a data row may hold arrives at a judge as it was."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid
from types import MappingProxyType
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xrl.rewards.values import NotCarried, from_json, to_json


def carried(value: Any) -> Any:
    return from_json(json.loads(json.dumps(to_json(value))))


def same(left: Any, right: Any) -> bool:
    """Equal and of equal types, all the way down; NaN equals itself, and zero does not equal minus zero."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return repr(left) == repr(right)
    return bool(left == right)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.decimals(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("$xrl"), inner) | st.tuples(inner, inner),
    max_leaves=10,
)


@settings(deadline=None, max_examples=50)
@given(PLAIN)
def test_values_arrive_exactly(value: Any) -> None:
    assert same(carried(value), value)


@pytest.mark.parametrize(
    "value",
    [
        2**4000,
        -0.0,
        5e-324,
        math.nan,
        -math.inf,
        {1: "a", "1": "b", None: "c"},
        {"$xrl": "builtins.bytes", "of": "AA=="},
        [("key", 1)],
        b"\0\xff",
        decimal.Decimal("1.20"),
        uuid.UUID(int=7),
        datetime.date(2024, 2, 29),
        datetime.timedelta(days=-1, microseconds=3),
        datetime.time(1, 2, 3, 4),
        datetime.datetime(2024, 1, 2, 3, 4, 5, 678901),
        datetime.datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
        datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=-3, seconds=1))),
        pandas.Timestamp(1_704_164_645_678_901_234, unit="ns"),
        pandas.Timestamp("2024-10-27 02:30", tz="UTC").tz_convert("Europe/Berlin"),
        pandas.Timedelta(3, unit="ns"),
    ],
    ids=repr,
)
def test_values_of_every_kind_arrive_exactly(value: Any) -> None:
    found = carried(value)
    assert same(found, value)
    if isinstance(value, datetime.datetime):
        assert (found.utcoffset(), found.fold) == (value.utcoffset(), value.fold)


def test_any_mapping_arrives_as_a_dictionary() -> None:
    assert carried(MappingProxyType({"a": 1})) == {"a": 1}


@pytest.mark.parametrize(
    ("value", "kind"),
    [(np.zeros(2), "a ndarray"), ({"a": [np.float64(1)]}, "a float64"), ({1, 2}, "a set"), (1j, "a c")],
)
def test_other_values_are_refused_by_their_type(value: Any, kind: str) -> None:
    with pytest.raises(NotCarried, match=kind):
        to_json(value)
