"""The TurboMind engine without a GPU: what is refused at once, LMDeploy's real code over a stand-in, whole workers.

`inside_lmdeploy.py` and the contract run in an environment of LMDeploy's, which `lmdeploy_environment.py` makes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rollout.engines import buckets, request
from tests.rollout.lmdeploy_environment import ROOT, environment, lmdeploy_python
from tests.rollout.test_contract import sizes, tiny_model
from tests.rollout.test_turbomind_tensors import write_config
from tests.tiny_models import make_checkpoint
from xrl.config import RolloutConfig, SettingsError
from xrl.config.parse import parse_settings
from xrl.rollout import create_engine
from xrl.rollout.fleet import Fleet, RolloutCounts
from xrl.rollout.publish import WeightStream
from xrl.rollout.turbomind_driver import SUPPORTED_VERSIONS
from xrl.types import Completion

MakeFleet = Callable[..., Fleet]


@pytest.mark.slow
@pytest.mark.parametrize("version", SUPPORTED_VERSIONS)
def test_adapter_works_in_lmdeploys_own_code(version: str) -> None:
    """The contract of engines and `inside_lmdeploy.py`, in the environment of that version."""
    files = [str(ROOT / "tests" / "rollout" / name) for name in ("test_contract.py", "inside_lmdeploy.py")]
    command = [str(lmdeploy_python(version)), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment()}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


# Which settings.


def engine_for(folder: Path, **settings: Any) -> object:
    defaults = {"dtype": "bfloat16", "device": "cuda:0", "max_batch_size": 4, "num_threads": 1, "max_model_len": 64}
    return create_engine("turbomind", model_dir=folder, **{**defaults, **settings})  # type: ignore[arg-type]


def test_without_lmdeploy_the_engine_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"lmdeploy is not installed for .*: see docs/turbomind\.md"):
        engine_for(write_config(tmp_path))


def test_fp32_and_devices_without_cuda_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    with pytest.raises(SettingsError, match="computes in bfloat16 or float16, got float32"):
        engine_for(tmp_path, dtype="float32")
    with pytest.raises(SettingsError, match="runs on CUDA devices only, got cpu"):
        engine_for(tmp_path, device="cpu")


def test_rollout_python_must_exist() -> None:
    with pytest.raises(SettingsError, match="--rollout-python /no/python must be a Python interpreter"):
        parse_settings(["--model", "m", "--data", "d", "--rollout-python", "/no/python"])


# Workers in LMDeploy's environment.


def test_worker_and_engine_need_little_of_the_trainers_environment() -> None:
    """Nothing compiled of xrl's, and no package that LMDeploy does not bring along."""
    code = (
        "import sys, xrl.rollout.worker, xrl.rollout.turbomind;"
        "print([m for m in sys.modules if m.split('.')[0] in ('transformers', 'megatron', 'tyro') or m == 'xrl._C'])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.fixture
def make_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeFleet]:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    fleets: list[Fleet] = []

    def make(**settings: Any) -> Fleet:
        config = RolloutConfig(engine="turbomind", rollout_python=lmdeploy_python(SUPPORTED_VERSIONS[-1]), **settings)
        fleet = Fleet(
            config,
            model_dir=make_checkpoint(tmp_path / "model", tied=False, **sizes()),
            dtype="bfloat16",
            devices=["cuda:0"],
            num_threads=1,
            max_model_len=64,
            log_dir=tmp_path,
        )
        fleets.append(fleet)
        return fleet

    yield make
    for fleet in fleets:
        fleet.close()


@pytest.mark.slow
def test_a_worker_of_another_environment_takes_updates_and_answers(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    publisher = WeightStream(fleet)
    for version in (1, 2):
        model = tiny_model(version)
        publisher.publish(buckets(model, version), version=version)
        answers: dict[int, list[Completion] | None] = dict(
            fleet.generate([request([3, 1, 4], num_samples=2, seed=version)], RolloutCounts())
        )
        completions = answers[0]
        assert completions is not None and len(completions) == 2
        for completion in completions:
            assert completion.weights_version == version
            with torch.no_grad():
                logits = model(torch.tensor([[3, 1, 4, *completion.token_ids]])).logits[0, 2:-1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-4)
    publisher.close()


@pytest.mark.slow
def test_a_worker_with_another_lmdeploy_ends_with_the_reason(
    make_fleet: MakeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = tmp_path / "newer"
    (newer / "lmdeploy-0.14.0.dist-info").mkdir(parents=True)
    (newer / "lmdeploy-0.14.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: lmdeploy\nVersion: 0.14.0\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(newer), environment()["PYTHONPATH"]]))
    with pytest.raises(RuntimeError, match=r"(?s)exit code 2: .*needs lmdeploy 0\.12\.3 or 0\.13\.0, found 0\.14\.0"):
        make_fleet().wait_until_ready()


# On a GPU: XRL_LMDEPLOY_PYTHON=/path/to/lmdeploy-env/bin/python .venv/bin/python -m pytest -m gpu tests/rollout


@pytest.mark.slow
def test_benchmark_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_turbomind.py")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.strip() == "This benchmark needs a CUDA device, and torch finds none."


@pytest.mark.gpu
def test_updates_take_effect_on_a_gpu() -> None:
    python = os.environ.get("XRL_LMDEPLOY_PYTHON")
    if python is None:
        pytest.skip("XRL_LMDEPLOY_PYTHON names no interpreter of an environment with LMDeploy")
    command = [python, str(ROOT / "benchmarks" / "gpu_turbomind.py"), "--requests=64", "--tokens=64"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert json.loads(result.stdout.splitlines()[-1])["wrong"] == []
