"""Values of a data row as JSON and back, exactly.

JSON lines hold nothing else. Parquet also knows dates, decimals, bytes and maps: what JSON has no word for becomes an
object whose key `$xrl` names its type.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import uuid
import zoneinfo
from collections.abc import Mapping
from typing import Any

_TYPE = "$xrl"
_PLAIN = (str, int, float, bool, type(None))


class NotCarried(ValueError):
    """A value that no judge in a process of its own can be given; says which, as the object of a sentence."""


def to_json(value: Any) -> Any:
    """What `json.dumps` writes so that `from_json` gives an equal value of the same type.

    Raises:
        NotCarried: a value of a type that is not known here.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [to_json(inner) for inner in value]
    if isinstance(value, Mapping):
        if _TYPE not in value and all(type(name) is str for name in value):
            return {name: to_json(inner) for name, inner in value.items()}
        return {_TYPE: "dict", "of": [[to_json(name), to_json(inner)] for name, inner in value.items()]}
    if kind is tuple:
        return {_TYPE: "tuple", "of": [to_json(inner) for inner in value]}
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind is bytes:
        return {_TYPE: name, "of": base64.b64encode(value).decode()}
    if kind in (decimal.Decimal, uuid.UUID):
        return {_TYPE: name, "of": str(value)}
    if kind is datetime.date:
        return {_TYPE: name, "of": value.isoformat()}
    if kind is datetime.timedelta:
        return {_TYPE: name, "of": [value.days, value.seconds, value.microseconds]}
    if kind in (datetime.datetime, datetime.time):
        zone = _zone_to_json(value.tzinfo)
        return {_TYPE: name, "of": value.replace(tzinfo=None).isoformat(), "zone": zone, "fold": value.fold}
    # Of pandas, which pyarrow makes of nanoseconds.
    is_of_pandas = kind.__module__.partition(".")[0] == "pandas"
    if is_of_pandas and kind.__name__ == "Timestamp":
        zone = _zone_to_json(value.tzinfo)
        naive = value if zone is None else value.tz_convert("UTC").tz_localize(None)
        return {_TYPE: "pandas.Timestamp", "of": naive.isoformat(), "unit": value.unit, "zone": zone}
    if is_of_pandas and kind.__name__ == "Timedelta":
        return {_TYPE: "pandas.Timedelta", "of": int(value.as_unit("ns").value), "unit": value.unit}
    raise NotCarried(f"a {kind.__name__}")


def from_json(found: Any) -> Any:
    """The value that `to_json` was given."""
    if type(found) is list:
        return [from_json(inner) for inner in found]
    if type(found) is not dict:
        return found
    if _TYPE not in found:
        return {name: from_json(inner) for name, inner in found.items()}
    return _of_type(found[_TYPE], found["of"], found)


def _of_type(kind: str, of: Any, found: Mapping[str, Any]) -> Any:
    if kind == "dict":
        return {from_json(name): from_json(inner) for name, inner in of}
    if kind == "tuple":
        return tuple(from_json(inner) for inner in of)
    if kind == "builtins.bytes":
        return base64.b64decode(of)
    if kind == "decimal.Decimal":
        return decimal.Decimal(of)
    if kind == "uuid.UUID":
        return uuid.UUID(of)
    if kind == "datetime.date":
        return datetime.date.fromisoformat(of)
    if kind == "datetime.timedelta":
        return datetime.timedelta(*of)
    if kind in ("datetime.datetime", "datetime.time"):
        read = datetime.datetime.fromisoformat if kind == "datetime.datetime" else datetime.time.fromisoformat
        return read(of).replace(tzinfo=_zone_from_json(found["zone"]), fold=found["fold"])
    import pandas  # only where the row has such a value

    if kind == "pandas.Timedelta":
        return pandas.Timedelta(of, unit="ns").as_unit(found["unit"])
    stamp = pandas.Timestamp(of).as_unit(found["unit"])
    zone = _zone_from_json(found["zone"])
    return stamp if zone is None else stamp.tz_localize("UTC").tz_convert(zone)


def _zone_to_json(zone: datetime.tzinfo | None) -> str | float | None:
    if zone is None:
        return None
    if isinstance(zone, datetime.timezone):
        return zone.utcoffset(None).total_seconds()
    if isinstance(zone, zoneinfo.ZoneInfo) and zone.key:
        return zone.key
    raise NotCarried(f"a time in a zone of type {type(zone).__name__}")


def _zone_from_json(zone: str | float | None) -> datetime.tzinfo | None:
    if zone is None:
        return None
    return zoneinfo.ZoneInfo(zone) if isinstance(zone, str) else datetime.timezone(datetime.timedelta(seconds=zone))
