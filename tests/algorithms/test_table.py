"""The table of algorithms."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xrl.algorithms import ALGORITHMS, check_algorithm, create_algorithm
from xrl.config import AlgorithmConfig, SettingsError


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_row_of_the_table_can_be_built(name):
    algorithm = create_algorithm(AlgorithmConfig(algorithm=name))
    assert algorithm.score([]).samples == []


def test_unknown_algorithm_is_refused_with_the_known_ones():
    with pytest.raises(SettingsError, match=r"'grop' is unknown \(the nearest is grpo\), the known ones are: grpo"):
        create_algorithm(AlgorithmConfig(algorithm="grop"))
    with pytest.raises(SettingsError):
        check_algorithm(AlgorithmConfig(algorithm=""))


def test_names_can_be_checked_without_torch():
    code = (
        "import sys, xrl.algorithms as a, xrl.config as c; a.check_algorithm(c.AlgorithmConfig());"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
