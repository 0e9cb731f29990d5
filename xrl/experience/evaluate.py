"""Pass rates on held-out prompts, greedy and sampled."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from xrl.config import EvaluationConfig
from xrl.experience.asking import Asking
from xrl.experience.collect import Collector
from xrl.metrics.pass_rate import pass_rates
from xrl.types import Group, Prompt, SamplingParams

logger = logging.getLogger("xrl")


class Evaluator:
    """Answers the same prompts each time, with the same seeds."""

    def __init__(
        self, collector: Collector, prompts: Sequence[Prompt], config: EvaluationConfig, sampling: SamplingParams
    ) -> None:
        """
        Args:
            prompts: held-out; the first `eval_max_prompts` are used.
            sampling: of training; the temperature is the evaluation's own, and nothing is filtered.
        """
        self.collector = collector
        self.prompts = list(prompts)[: config.eval_max_prompts]
        self.num_samples = config.eval_samples_per_prompt
        self.greedy = _with_temperature(sampling, 0.0)
        self.sampled = _with_temperature(sampling, config.eval_temperature)

    def evaluate(self) -> Asking[dict[str, float]]:
        """`eval/greedy`, `eval/pass@1` and `eval/pass@k`: shares of prompts answered right, in [0, 1].

        A prompt that no worker could answer, and an answer that nobody could judge, are not wrong: they are left out.
        `eval/prompts` counts all prompts, `eval/greedy/prompts` and so on those that the rate is of.
        """
        greedy = yield from self._rewards(self.greedy, 1, "greedy evaluation")
        sampled = yield from self._rewards(self.sampled, self.num_samples, "sampled evaluation")
        rates = {"eval/greedy": pass_rates(greedy, [1])["pass@1"]}
        counts = {"eval/greedy/prompts": _num_with(greedy, 1)}
        ks = sorted({1, self.num_samples})
        for k, (name, rate) in zip(ks, pass_rates(sampled, ks).items(), strict=True):
            rates[f"eval/{name}"] = rate
            counts[f"eval/{name}/prompts"] = _num_with(sampled, k)
        return {**rates, "eval/prompts": float(len(self.prompts)), **counts}

    def _rewards(self, sampling: SamplingParams, num_samples: int, description: str) -> Asking[list[list[float]]]:
        """[prompts][samples] of what was answered and judged."""
        collected = yield from self.collector.collect(
            self.prompts, sampling=sampling, num_samples=num_samples, description=description
        )
        rows = [_rewards_of(group) for group in collected.groups]
        num_unjudged = sum(len(group.episodes) for group in collected.groups) - sum(map(len, rows))
        if num_unjudged or len(rows) < len(self.prompts):
            logger.warning(
                "%s: %d of %d prompts failed, and %d answers were cut off or nobody could judge them; "
                "the rates leave them out",
                description,
                len(self.prompts) - len(rows),
                len(self.prompts),
                num_unjudged,
            )
        return rows


def _rewards_of(group: Group) -> list[float]:
    return [
        episode.verdict.reward
        for episode in group.episodes
        if episode.verdict.reward is not None and episode.status in ("done", "length", "max_turns")
    ]


def _num_with(rewards: Sequence[Sequence[float]], num_samples: int) -> float:
    """Prompts with so many judged answers at least."""
    return float(sum(len(row) >= num_samples for row in rewards))


def _with_temperature(sampling: SamplingParams, temperature: float) -> SamplingParams:
    return SamplingParams(
        temperature=temperature,
        max_new_tokens=sampling.max_new_tokens,
        stop_token_ids=sampling.stop_token_ids,
        seed=sampling.seed,
    )
