"""Names that settings take from tables of rooms above, for `--help`; and the nearest name to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a setting may be called, where a table says so instead of its type."""

    known: tuple[str, ...]
    other: Mapping[str, str] = field(default_factory=dict)  # another name -> the known one
    own: str = ""  # how something of the user's own is named

    @property
    def words(self) -> str:
        """Like `{embedded,turbomind (lmdeploy)} or package.module:factory`."""
        others = {name: [other for other, known in self.other.items() if known == name] for name in self.known}
        shown = (f"{name} ({', '.join(others[name])})" if others[name] else name for name in self.known)
        return f"{{{','.join(shown)}}}" + (f" or {self.own}" if self.own else "")


# Setting -> its names. A test holds them to the tables in xrl/rollout, xrl/rewards and xrl/algorithms, which this room
# may not import.
NAMES: Mapping[str, Names] = MappingProxyType(
    {
        "engine": Names(known=("embedded", "turbomind"), other={"lmdeploy": "turbomind"}, own="package.module:factory"),
        "judge": Names(known=("gsm8k", "gsm8k-exact", "math-verify"), own="path/file.py:function"),
        "algorithm": Names(known=("grpo",), own="path/file.py:Class"),
    }
)


def known_name(setting: str, text: str) -> str:
    """`text`, or the known name that it is another name of."""
    names = NAMES.get(setting)
    return names.other.get(text, text) if names else text


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be; None where none is near."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return near[0] if near else None


def hint(setting: str, text: str) -> str:
    """` (the nearest is X)`, to stand after `is unknown`; nothing where no name of the setting is near."""
    near = nearest(text, [*NAMES[setting].known, *NAMES[setting].other])
    return f" (the nearest is {near})" if near else ""
