"""A run's parts in one place, on one rank: built, used by a loop of one's own, and ended whatever happens."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.rollout.fleets import ROOT
from tests.rollout.warm_workers import WarmStarts
from tests.samples import completion_of
from tests.small_runs import run_flags, write_rows
from tests.tiny_models import make_checkpoint
from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from xrl.algorithms.grpo import GRPO  # noqa: E402
from xrl.config import ParallelConfig, Settings, SettingsError  # noqa: E402
from xrl.config.parse import parse_settings  # noqa: E402
from xrl.experience.experience import Batch  # noqa: E402
from xrl.metrics.ending import Ending  # noqa: E402
from xrl.metrics.sinks import read_rows  # noqa: E402
from xrl.parallel.megatron import initialize, shutdown  # noqa: E402
from xrl.rollout.answers import WorkerRefused  # noqa: E402
from xrl.rollout.process import WorkerProcess  # noqa: E402
from xrl.session import Session  # noqa: E402
from xrl.trainer import Trainer  # noqa: E402
from xrl.types import GenerateRequest, Prompt, SamplingParams  # noqa: E402


class Judge:
    """Gives every other answer a reward, so that there is something to learn, and keeps what it heard."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def __call__(self, response: str, prompt: Prompt) -> float:
        self.heard.append(prompt.ground_truth)
        return float(len(self.heard) % 2)


class Starts:
    """Stands for the module `subprocess` where workers are started, and keeps them."""

    PIPE, DEVNULL, TimeoutExpired = subprocess.PIPE, subprocess.DEVNULL, subprocess.TimeoutExpired

    def __init__(self) -> None:
        self.started: list[Any] = []

    def Popen(self, *arguments: Any, **options: Any) -> Any:
        start = WarmStarts.Popen if sys.platform == "linux" else subprocess.Popen
        self.started.append(start(*arguments, **options))
        return self.started[-1]

    @property
    def have_ended(self) -> bool:
        return all(process.poll() is not None for process in self.started)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(autouse=True)
def starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Starts]:
    found = Starts()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("xrl.rollout.process.subprocess", found)
    yield found
    gc.freeze()  # a session that ends has the garbage collector look at everything again


def settings(model: Path, folder: Path, *flags: str) -> Settings:
    data = write_rows(folder / "train.jsonl", [{"prompt": f"{i}+1=?", "ground_truth": "train"} for i in range(8)])
    held_out = write_rows(folder / "eval.jsonl", [{"prompt": f"{i}+2=?", "ground_truth": "eval"} for i in range(3)])
    return parse_settings(
        [
            *run_flags(model, data, folder),
            *("--max-response-length", "8", "--num-rollouts", "2", "--canary-tokens", "4"),
            *("--rollout-num-threads", "1", "--eval-data", str(held_out), "--eval-samples-per-prompt", "2"),
            *flags,
        ]
    )


def versions(batch: Batch) -> set[int]:
    """Of the weights that sampled it."""
    return {completion_of(episode).weights_version for group in batch.groups for episode in group.episodes}


def worker_of(run: Session) -> WorkerProcess:
    assert run.fleet is not None
    (worker,) = run.fleet.workers
    assert isinstance(worker, WorkerProcess)
    return worker


def test_a_loop_of_ones_own_takes_learns_publishes_and_evaluates(model: Path, tmp_path: Path, starts: Starts) -> None:
    judge = Judge()
    with Session(settings(model, tmp_path), judge=judge) as run:
        assert run.leads and run.num_steps == 2 and run.fleet is not None
        assert run.fleet.version is None
        run.publish(version=0)
        rates = run.evaluate()
        assert rates["eval/prompts"] == 3 and {"eval/greedy", "eval/pass@1", "eval/pass@2"} <= set(rates)
        assert judge.heard == ["eval"] * 3 * (1 + 2)
        for step in (1, 2):
            batch = run.take(step)
            assert judge.heard[-8:] == ["train"] * 8
            assert batch.samples is not None and len(batch.samples) == batch.metrics["samples/total"] == 8
            assert versions(batch) == {step - 1}
            assert len(run.actor.learn(batch.samples, run.algorithm)) == 1
            published = run.publish(version=step)
            assert run.fleet.version == step
            assert published.metrics["canary"] < 1e-4  # the engine has the weights that the actor has by now
        folder = run.folder
    assert folder is not None and folder.path.parent == tmp_path / "work" and folder.config.is_file()
    assert len(starts.started) == 1 and starts.have_ended
    assert not dist.is_initialized()


def test_the_trainer_is_that_of_xrl_train_with_hooks_and_a_step_of_ones_own(model: Path, tmp_path: Path) -> None:
    events: list[Any] = []

    class Own(Trainer):
        def step(self, step: int) -> None:
            events.append(f"step {step}")
            super().step(step)

    def hook(trainer: Trainer, step: int) -> None:
        folder = run.folder
        assert folder is not None
        # After those of xrl train: evaluation and checkpoints.
        rows = read_rows(folder.metrics)
        events.append(
            (step, [row["step"] for row in rows if "eval/greedy" in row], (folder.path / "hf-final").is_dir())
        )

    ending = Ending()
    with Session(settings(model, tmp_path), judge=Judge(), ending=ending) as run:
        assert (ending.folder, ending.num_rollouts) == (run.folder, 2)
        trainer = run.trainer(hooks=[hook], kind=Own)
        assert type(trainer) is Own and trainer.num_steps == 2 and trainer.algorithm is run.algorithm
        trainer.train()
        assert run.folder is not None
        assert [row["step"] for row in read_rows(run.folder.metrics) if "updates" in row] == [1, 2]
    assert events == [(0, [0], False), "step 1", (1, [0], False), "step 2", (2, [0, 2], True)]
    assert ending.num_learned == 2


def test_weights_are_published_once_more_where_no_worker_is_ready(
    model: Path, tmp_path: Path, starts: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    def lose_the_worker(run: Session) -> None:
        process = worker_of(run)._process
        process.send_signal(signal.SIGKILL)
        process.wait(60)

    with Session(settings(model, tmp_path), judge=Judge()) as run:
        run.publish(version=0)
        run.publish(version=7)
        lose_the_worker(run)
        batch = run.take(1)
        assert versions(batch) == {7} and len(batch.groups) == 4
        assert caplog.text.count("no rollout worker is ready: weights version 7 are published once more") == 1
        lose_the_worker(run)
        assert run.evaluate()["eval/prompts"] == 3
        assert caplog.text.count("weights version 7 are published once more") == 2
        assert run.fleet is not None and (run.fleet.num_restarted, run.fleet.version) == (2, 7)
    assert len(starts.started) == 3 and starts.have_ended


def test_on_shared_devices_the_engines_sleep_from_a_take_to_the_next_publication(model: Path, tmp_path: Path) -> None:
    asked = GenerateRequest(id="a", token_ids=[5], num_samples=1, sampling=SamplingParams(max_new_tokens=2))
    with Session(settings(model, tmp_path, "--colocate"), judge=Judge()) as run:
        assert run.fleet is not None
        run.publish(version=0)
        assert len(run.fleet.ask_all(asked, timeout_s=60)) == 1
        batch = run.take(1)
        with pytest.raises(WorkerRefused, match="asleep"):
            run.fleet.ask_all(asked, timeout_s=60)
        run.actor.learn(batch.samples, run.algorithm)
        run.publish(version=1)
        assert len(run.fleet.ask_all(asked, timeout_s=60)) == 1
        run.trainer().step(2)  # which takes turns itself
        assert run.fleet.version == 2


def test_groups_that_are_given_are_used_and_left(model: Path, tmp_path: Path, starts: Starts) -> None:
    groups = initialize(ParallelConfig(), seed=1)
    try:
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            with Session(settings(model, tmp_path / name), judge=Judge(), groups=groups) as run:
                assert run.groups is groups
                run.publish(version=0)
            assert dist.is_initialized() and starts.have_ended
    finally:
        shutdown()


def test_an_algorithm_is_that_of_the_settings_unless_one_is_given(model: Path, tmp_path: Path) -> None:
    chosen = settings(model, tmp_path, "--clip-low", "0.125")
    own = GRPO(chosen.algorithm)
    assert Session(chosen, algorithm=own).algorithm is own
    found = Session(chosen).algorithm
    assert isinstance(found, GRPO) and found.settings.clip_low == 0.125


def test_a_refusal_on_entry_leaves_nothing_behind(model: Path, tmp_path: Path, starts: Starts) -> None:
    with (
        pytest.raises(SettingsError, match="has no prompt within --max-prompt-length 2"),
        Session(settings(model, tmp_path, "--max-prompt-length", "2"), judge=Judge()),
    ):
        pass
    assert not starts.started and not dist.is_initialized()
    assert not (tmp_path / "work").exists()


def test_an_error_on_entry_ends_the_workers_that_run_by_then(model: Path, tmp_path: Path, starts: Starts) -> None:
    broken = make_checkpoint(tmp_path / "broken", num_hidden_layers=2)
    (broken / "model.safetensors").unlink()
    with pytest.raises(Exception, match="safetensors"), Session(settings(broken, tmp_path), judge=Judge()):
        pass
    assert len(starts.started) == 1 and starts.have_ended
    assert not dist.is_initialized()


def test_an_error_in_the_loop_ends_the_run_and_is_the_loop_s(model: Path, tmp_path: Path, starts: Starts) -> None:
    with pytest.raises(ZeroDivisionError), Session(settings(model, tmp_path), judge=Judge()) as run:
        run.publish(version=1 // 0)
    assert starts.have_ended and not dist.is_initialized()
