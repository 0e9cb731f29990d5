"""argparse for the small commands, with bad input told as everywhere else."""

from __future__ import annotations

import argparse
from typing import NoReturn

from xrl.config.errors import SettingsError


class SentenceParser(argparse.ArgumentParser):
    """Raises a SettingsError of one sentence where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (`{self.prog} --help` tells more)")
