"""`import xrl`: which names there are, what they take, what importing them costs, and that the examples run."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import xrl

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api.md"
HEADING = re.compile(r"^### `(\w+)(\(.*\))?`$", re.MULTILINE)


def documented(section: str) -> dict[str, str]:
    """Names of a part of docs/api.md, each with its parameters; empty for a type that is not called."""
    before, _, kernels = API.read_text().partition("## Kernels")
    return dict(HEADING.findall(kernels if section == "kernels" else before))


def parameters_of(what: Any) -> str:
    """A signature without types."""
    signature = inspect.signature(what)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_the_names_are_those_of_the_documentation() -> None:
    assert sorted(xrl.__all__) == sorted([*documented("parts"), "kernels"])
    assert set(xrl.__all__) <= set(dir(xrl))


@pytest.mark.parametrize("name", sorted(documented("parts")))
def test_what_can_be_called_takes_what_the_documentation_says(name: str) -> None:
    parameters = documented("parts")[name]
    found = getattr(xrl, name)
    if parameters:
        assert parameters_of(found) == parameters


@pytest.mark.parametrize("name", sorted(documented("kernels")))
def test_a_kernel_takes_what_the_documentation_says(name: str) -> None:
    assert parameters_of(getattr(xrl.kernels, name)) == documented("kernels")[name]
    assert name in xrl.kernels.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'xrl' has no attribute 'Aktor'"):
        _ = xrl.Aktor


def test_importing_it_loads_nothing_large() -> None:
    code = "import json, sys, xrl; xrl.load_settings; print(json.dumps([name.split('.')[0] for name in sys.modules]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "megatron", "transformers", "numpy", "triton"} & set(
        json.loads(found.stdout.replace("'", '"'))
    )


@pytest.mark.slow
def test_a_loop_of_ones_own_runs_on_one_rank_and_on_four_and_comes_to_the_same(tmp_path: Path) -> None:
    on_one, on_four = (
        json.loads(run_example("own_loop.py", tmp_path, config, num_ranks).splitlines()[-1])
        for config, num_ranks in (("demo_single", 1), ("demo_tp2pp2", 4))
    )
    assert on_one["steps"] == on_four["steps"] == 2
    # The same model, prompts and seeds: the sums of four ranks round otherwise, and a draw may be another by that.
    assert on_one["before"] == pytest.approx(on_four["before"], abs=0.02)
    assert on_one["after"] == pytest.approx(on_four["after"], abs=0.05)
    assert 0.4 < on_one["before"] < 0.6


@pytest.mark.slow
def test_a_loop_of_ones_own_takes_turns_with_engines_on_the_same_devices(tmp_path: Path) -> None:
    found = run_example("own_loop.py", tmp_path, "demo_single", 1, "--colocate")
    assert json.loads(found.splitlines()[-1])["steps"] == 2


@pytest.mark.slow
def test_a_step_of_the_trainer_can_be_changed(tmp_path: Path) -> None:
    found = run_example("own_trainer.py", tmp_path, "demo_single", 1)
    assert found.splitlines()[-1] == "step 2 of 2: the engines have weights version 2"
    (folder,) = tmp_path.iterdir()
    assert (folder / "hf-final" / "model.safetensors").is_file()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # Answers of 31 and 32 tokens are sampled, and not learned from.
    assert max(row.get("response_length/max", 0) for row in rows) > 30


def run_example(name: str, work_dir: Path, config: str, num_ranks: int, *flags: str) -> str:
    flags = ("--config", f"configs/{config}.yaml", "--num-rollouts=2", f"--work-dir={work_dir}", *flags)
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"] if num_ranks > 1 else []
    command = [sys.executable, *launcher, f"examples/{name}", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout
