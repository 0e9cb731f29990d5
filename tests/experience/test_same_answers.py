"""Equal answers, to the bit, through real workers: in whatever order, however many, cut off or lost in the middle."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.experience.askings import finished
from tests.rollout.engines import buckets
from tests.rollout.fleets import ROOT
from tests.rollout.scripted_workers import Words
from tests.rollout.warm_workers import WarmStarts
from tests.samples import completion_of, prompt
from tests.tiny_models import make_model
from xrl.config import RolloutConfig
from xrl.experience.collect import Collected, Collector
from xrl.launch.progress import Progress
from xrl.rewards.judge import InlineJudge
from xrl.rollout.fleet import Fleet
from xrl.rollout.publish import WeightStream
from xrl.types import Completion, Prompt, SamplingParams

NUM_PROMPTS, NUM_SAMPLES, HALF = 64, 2, 32
LONGEST_PROMPT, LONGEST_ANSWER = 40, 88
# About every 25th token: half of the groups are whole when the others have come as far, and more to go.
SAMPLING = SamplingParams(max_new_tokens=LONGEST_ANSWER, stop_token_ids=(11, 37, 59, 83), seed=5)
PACED = "tests.rollout.paced_engine:make"

Workers = Callable[..., contextlib.AbstractContextManager[Fleet]]
# Of each prompt, its samples in order: ids, the bits of the log-probs, why it ended.
Answers = dict[int, list[tuple[list[int], bytes, str]]]


class Hook(Progress):
    """Has something done as soon as the next answer is there."""

    def __init__(self) -> None:
        super().__init__()
        self.at_next: Callable[[], None] | None = None

    def advance(self) -> None:
        super().advance()
        action, self.at_next = self.at_next, None
        if action is not None:
            action()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Starts worker processes of the embedded engine with the weights of one model."""
    model, folder = make_model(), tmp_path_factory.mktemp("model")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)

    @contextlib.contextmanager
    def start(num_workers: int, *, engine: str, dtype: str) -> Iterator[Fleet]:
        fleet = Fleet(
            RolloutConfig(engine=engine, rollout_max_restarts=0),
            model_dir=folder,
            dtype=dtype,
            devices=["cpu"] * num_workers,
            num_threads=1,
            max_model_len=LONGEST_PROMPT + LONGEST_ANSWER,
            log_dir=folder,
        )
        with fleet, contextlib.closing(WeightStream(fleet)) as stream:
            stream.publish(buckets(model), version=0)
            yield fleet

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        if sys.platform == "linux":
            patch.setattr("xrl.rollout.process.subprocess", WarmStarts)
        yield start


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, LONGEST_PROMPT + 1, (NUM_PROMPTS,), generator=generator).tolist()
    return [
        prompt(*torch.randint(1, 98, (length,), generator=generator).tolist(), id=number)
        for number, length in enumerate(lengths)
    ]


def collect(collector: Collector, asked: list[Prompt], **options: Any) -> Collected:
    return finished(
        collector.collect(asked, sampling=SAMPLING, num_samples=NUM_SAMPLES, description="samples", **options)
    )


def completions(*found: Collected) -> dict[int, list[Completion]]:
    groups = [group for each in found for group in each.groups]
    return {group.episodes[0].prompt.id: list(map(completion_of, group.episodes)) for group in groups}


def answers(found: dict[int, list[Completion]]) -> Answers:
    return {
        number: [(each.token_ids.tolist(), each.logprobs.tobytes(), each.finish_reason) for each in samples]
        for number, samples in found.items()
    }


@pytest.fixture(scope="module")
def expected(workers: Workers) -> Callable[[str], Answers]:
    """The answers of one worker that is asked for all in order, and not disturbed."""
    known: dict[str, Answers] = {}

    def in_order(dtype: str) -> Answers:
        if dtype not in known:
            with workers(1, engine="embedded", dtype=dtype) as fleet:
                known[dtype] = answers(completions(collect(collector_of(fleet), prompts())))
        return known[dtype]

    return in_order


def collector_of(fleet: Fleet, progress: Progress | None = None) -> Collector:
    return Collector(fleet, Words(), InlineJudge(lambda response, asked: 1.0), progress)  # type: ignore[arg-type]


def kill(fleet: Fleet, number: int) -> None:
    process = fleet.workers[number]._process  # type: ignore[attr-defined]
    process.send_signal(signal.SIGKILL)
    process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "dtype"),
    [
        (2, "float32"),
        (3, "float32"),
        (1, "bfloat16"),
        # More of the same: `make test-cluster` has the time for it.
        pytest.param(1, "float32", marks=pytest.mark.cluster),
        pytest.param(3, "bfloat16", marks=pytest.mark.cluster),
    ],
)
def test_prompts_reversed_split_cut_off_and_lost_get_the_answers_that_they_get_in_order(
    workers: Workers, expected: Callable[[str], Answers], num_workers: int, dtype: str
) -> None:
    hook = Hook()
    with workers(num_workers, engine=PACED, dtype=dtype) as fleet:
        collector = collector_of(fleet, hook)
        for ordinal, asked in reversed(list(enumerate(prompts()))):  # they queue up, and are asked in this order
            collect(collector, [asked], first_ordinal=ordinal, enough=0)
        assert collector.num_carried == NUM_PROMPTS

        if num_workers > 1:
            hook.at_next = lambda: kill(fleet, 0)
        first = collect(collector, [], enough=HALF)
        assert len(first.groups) == collector.num_carried == HALF
        if num_workers > 2:
            hook.at_next = lambda: kill(fleet, 1)
        rest = collect(collector, [], enough=HALF)
        assert (len(rest.groups), collector.num_carried) == (HALF, 0)

        num_killed = min(num_workers, 3) - 1
        assert fleet.num_lost == num_killed
        assert first.counts.retried >= (num_killed > 0) and rest.counts.retried >= (num_killed > 1)
    found = completions(first, rest)
    assert answers(found) == expected(dtype)
    continued = [each for samples in found.values() for each in samples if len(each.parts) > 1]
    assert len(continued) >= HALF // 2


@pytest.mark.slow
def test_the_answers_tell_prompts_and_samples_apart(workers: Workers, expected: Callable[[str], Answers]) -> None:
    found = [tuple(ids) for samples in expected("float32").values() for ids, _, _ in samples]
    assert len(found) == NUM_PROMPTS * NUM_SAMPLES
    assert len({ids for ids in found if len(ids) > 4}) > NUM_PROMPTS
