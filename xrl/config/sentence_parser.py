"""argparse for the small commands, with bad input told as everywhere else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from xrl.config.errors import SettingsError
from xrl.config.flags import LARGEST_COUNT
from xrl.config.names import nearest
from xrl.config.numbers import whole_number
from xrl.config.printable import shown


def _whole_number(text: str) -> int:
    number = whole_number(text)
    if number is not None and abs(number) <= LARGEST_COUNT:
        return number
    if text.isascii() and text.isdigit():
        raise argparse.ArgumentTypeError(f"a whole number of at most {LARGEST_COUNT:,} is needed, found {shown(text)}")
    raise ValueError(text)  # which argparse has a sentence for


class SentenceParser(argparse.ArgumentParser):
    """Raises a SettingsError of one sentence where argparse would print its usage and exit."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # `type=int` of a flag; argparse names the type in its sentence.
        self.register("type", int, _whole_number)

    def parse_args(  # type: ignore[override]  # argparse says it in overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse does, but a misspelt flag is told before the one that is missing for it."""
        flags = self._option_string_actions
        for word in sys.argv[1:] if args is None else args:
            name = word.partition("=")[0]
            if name.startswith("--") and not any(flag.startswith(name) for flag in flags):  # it takes beginnings
                near = nearest(name, flags)
                self.error(f"flag {name} is unknown" + (f"; the nearest is {near}" if near else ""))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (`{self.prog} --help` tells more)")
