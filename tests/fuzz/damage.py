"""Ways in which a file that a run reads can be wrong: its bytes, its JSON, its values."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# What stands where something else is meant.
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 10**5, 2**31, 2**63, 10**30, 10**400, -(10**20)),
    *(0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan")),
    *("", " ", "5", "x", "null", "../../x", "/dev/zero", "é" * 300, "y" * 10_000, "a\0b", "\ud800"),
    *("\x1b[2J", "\x9b2J", "a\nxrl: error: fake", "a\u2028b", "\u202eb"),
    *([], [[]], [None], [1], ["x"], {}, {"": {}}, {"a": 1}),
)
ODD_KEYS = ("new", "", "\x1b[2J", "a\nxrl: error: fake", "\u202ex", "auto_map", "quantization_config", "z" * 10_000)
# What stands in the middle of a file.
ODD_BYTES = (
    *(b"\0", b"\r", b"\n", b"\x0b", b"\x1b[2J", b"\x7f", b"\xff\xfe", b"\xed\xa0\x80", b"\xc2\x85", b"\xe2\x80\xa8"),
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u0000", b"\\ud800", b"NaN", b"1e999", b"9" * 5000),
)
# What stands in place of a file.
ODD_FILES = (
    *(b"", b"\n", b"null", b"0", b'""', b"[]", b"{}", b"{}{}", b"[" * 100_000, b'{"a":' * 100_000),
    *(b"[" * 90 + b"]" * 90, b'{"a": 1, "a": 2}', b"\xff" * 100, b"\0" * 100, b"x" * 100_000, b"-" * 1000),
)


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """The same file, cut, garbled, in another encoding, or another one altogether."""
    where = rng.randrange(len(content) + 1)
    match rng.randrange(7):
        case 0:
            return content[:where]
        case 1:
            return content[:where] + rng.choice(ODD_BYTES) + content[where:]
        case 2:
            return content[:where] + content[where + rng.choice([1, 2, 50]) :]
        case 3:
            return content[:where] + bytes([rng.randrange(256)]) + content[where + 1 :]
        case 4:
            encoding = rng.choice(["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
            return content.decode(errors="replace").encode(encoding)
        case 5:
            return content.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b"\n\t\n"]))
        case _:
            return rng.choice(ODD_FILES)


def damaged_value(rng: random.Random, value: Any) -> Any:
    """The same value with something in it replaced, added, taken out or doubled."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []
    node = value
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        places.append((node, key))
        node = node[key]
    if not places:
        return rng.choice(ODD_VALUES)
    node, key = rng.choice(places)
    match rng.randrange(5):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[rng.choice(ODD_KEYS)] = rng.choice(ODD_VALUES)
        case 2 if isinstance(node, list):
            node.insert(key, rng.choice([node[key], rng.choice(ODD_VALUES)]))
        case 3 if type(node[key]) in (int, float):
            number = node[key]
            as_float = float(number) if abs(number) < 1e308 else float("inf")  # what stands there may be 10**400
            node[key] = rng.choice([number + 1, -number, number * 2, str(number), as_float])
        case _:
            node[key] = rng.choice(ODD_VALUES)
    return value


def damaged_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON file with one or two values damaged, or with its bytes."""
    if rng.random() < 0.25:
        return damaged_bytes(rng, content)
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 2])):
        value = damaged_value(rng, value)
    return json.dumps(value).encode()
