"""Prompts -> judged groups: ask the workers, judge while others still generate, keep what came back whole."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from xrl.rewards import JudgePool, Verdict
from xrl.rollout.pool import RolloutCounts, WorkerPool
from xrl.types import Completion, GenerateRequest, Group, Prompt, Rollout, SamplingParams

logger = logging.getLogger("xrl")

# Between lines on how far a rollout is, where there is no terminal for a bar.
PROGRESS_S = 30.0
# Odd and large: seeds of neighbouring prompts and neighbouring rollouts never meet.
_SEED_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One rollout."""

    groups: list[Group]  # in the order of the prompts; prompts that failed are missing
    counts: RolloutCounts
    seconds: float
    num_tokens: int  # response tokens


class Collector:
    """Turns prompts into judged groups."""

    def __init__(self, pool: WorkerPool, tokenizer: PreTrainedTokenizerBase, judge: JudgePool) -> None:
        self.pool = pool
        self.tokenizer = tokenizer
        self.judge = judge

    def collect(
        self, prompts: Sequence[Prompt], *, sampling: SamplingParams, num_samples: int, description: str
    ) -> Collected:
        """Draw `num_samples` answers to every prompt and judge them.

        A prompt whose request failed for good, or whose answers were cut off by an abort, is left out and counted.

        Args:
            sampling: its seed is that of the rollout; each prompt draws from its own.
            description: what the bar says it is for, "training samples" say.
        """
        start = time.perf_counter()
        counts = RolloutCounts()
        requests = [_request(place, prompt, sampling, num_samples) for place, prompt in enumerate(prompts)]
        judged: dict[int, list[tuple[Completion, str, Future[Verdict]]]] = {}
        has_terminal = sys.stderr.isatty()
        said = start
        with tqdm(
            total=len(prompts),
            desc=f"rollout_controller for {description}",
            disable=not has_terminal,
            leave=False,
        ) as bar:
            for place, completions in self.pool.generate(requests, counts):
                if completions is not None and _is_whole(completions):
                    judged[place] = [self._judge(prompts[place], completion) for completion in completions]
                elif completions is not None:
                    counts.finished -= 1
                    counts.failed += 1
                bar.update()
                if not has_terminal and time.perf_counter() - said > PROGRESS_S:
                    said = time.perf_counter()
                    logger.info("%s: %d of %d prompts done", description, counts.finished + counts.failed, len(prompts))
        groups = [
            Group(rollouts=tuple(_rollout(prompts[place], *parts) for parts in judged[place]))
            for place in sorted(judged)
        ]
        _log_counts(description, counts)
        return Collected(
            groups=groups,
            counts=counts,
            seconds=time.perf_counter() - start,
            num_tokens=sum(len(r.completion.token_ids) for group in groups for r in group.rollouts),
        )

    def _judge(self, prompt: Prompt, completion: Completion) -> tuple[Completion, str, Future[Verdict]]:
        response = str(self.tokenizer.decode(completion.token_ids, skip_special_tokens=True))
        return completion, response, self.judge.submit(response, prompt)


def _request(place: int, prompt: Prompt, sampling: SamplingParams, num_samples: int) -> GenerateRequest:
    # The place, not the prompt's id: a batch that crosses an epoch may hold a prompt twice.
    seed = (sampling.seed * _SEED_STEP + place) % 2**63
    return GenerateRequest(
        id=f"{sampling.seed}-{place}",
        token_ids=prompt.token_ids,
        num_samples=num_samples,
        sampling=dataclasses.replace(sampling, seed=seed),
    )


def _is_whole(completions: Sequence[Completion]) -> bool:
    return all(completion.finish_reason in ("stop", "length") for completion in completions)


def _rollout(prompt: Prompt, completion: Completion, response: str, verdict: Future[Verdict]) -> Rollout:
    result = verdict.result()
    return Rollout(
        prompt=prompt,
        completion=completion,
        response=response,
        reward=result.reward,
        judge_failed=result.failed,
    )


def _log_counts(description: str, counts: RolloutCounts) -> None:
    if counts.failed or counts.retried:
        logger.warning(
            "%s: sent %d, finished %d, failed %d, retried %d",
            description,
            counts.sent,
            counts.finished,
            counts.failed,
            counts.retried,
        )
