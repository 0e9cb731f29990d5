"""Pass rates on held-out prompts, greedy and sampled."""

from __future__ import annotations

from collections.abc import Sequence

from xrl.config import EvaluationConfig
from xrl.metrics.pass_rate import pass_rates
from xrl.rollout.collect import Collector
from xrl.types import Group, Prompt, SamplingParams


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

    def evaluate(self) -> dict[str, float]:
        """`eval/greedy`, `eval/pass@1` and `eval/pass@k`: shares of prompts answered right, in [0, 1].

        A prompt that no worker could answer counts as wrong.
        """
        greedy = self._rewards(self.greedy, 1, "greedy evaluation")
        sampled = self._rewards(self.sampled, self.num_samples, "sampled evaluation")
        rates = {f"eval/{name}": value for name, value in pass_rates(sampled).items()}
        return {"eval/greedy": pass_rates(greedy)["pass@1"], **rates}

    def _rewards(self, sampling: SamplingParams, num_samples: int, description: str) -> list[list[float]]:
        collected = self.collector.collect(
            self.prompts, sampling=sampling, num_samples=num_samples, description=description
        )
        answered = {group.rollouts[0].prompt.id: _rewards_of(group, num_samples) for group in collected.groups}
        return [answered.get(prompt.id, [0.0] * num_samples) for prompt in self.prompts]


def _rewards_of(group: Group, num_samples: int) -> list[float]:
    rewards = [rollout.reward for rollout in group.rollouts]
    return rewards + [0.0] * (num_samples - len(rewards))


def _with_temperature(sampling: SamplingParams, temperature: float) -> SamplingParams:
    return SamplingParams(
        temperature=temperature,
        max_new_tokens=sampling.max_new_tokens,
        stop_token_ids=sampling.stop_token_ids,
        seed=sampling.seed,
    )
