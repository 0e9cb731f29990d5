"""What a person reads on the console: the start of a run, a line per update, the table at the end."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from xrl.config import AlgorithmConfig, OptimizerConfig, RolloutConfig, Settings

SECONDS_PREFIX = "seconds/"

# Counts of what is not trained on, and their words.
LEFT_OUT = (
    ("groups/zero_variance", "groups of equal rewards"),
    ("groups/too_small", "groups with fewer than 2 answers"),
    ("samples/failed", "failed answers"),
    ("samples/unjudged", "of these that nobody could judge"),
)


def start_lines(settings: Settings, *, world_size: int, num_prompts: int, num_rollouts: int) -> list[str]:
    """What this run is about to do: model, layout, sampling, batch words, algorithm, optimizer.

    Args:
        settings: all of them.
        world_size: ranks of the actor.
        num_prompts: training prompts left after those too long were dropped.
        num_rollouts: rollouts the run will make.
    """
    return [
        f"model: {settings.model.model}",
        f"layout: {_layout(settings, world_size)}",
        f"sampling: {_sampling(settings.rollout)}",
        f"data: {settings.data.data}, {num_prompts:,} prompts, {num_rollouts:,} rollouts",
        f"batch: {_batch(settings)}",
        f"algorithm: {_algorithm(settings.algorithm)}",
        f"optimizer: {_optimizer(settings.optimizer)}",
    ]


def rollout_finished_line(rollout_id: int, trajectory: Path | None) -> str:
    """The line for a rollout that is judged and, if the disk has room, written down."""
    return f"rollout_idx {rollout_id} finished" + (f", saved trajectories to {trajectory}" if trajectory else "")


def prepared_line(num_samples: int, metrics: Mapping[str, float]) -> str:
    """The line for samples that are ready to train on, with what was left out and why.

    Args:
        num_samples: samples to train on.
        metrics: of `Scored`; names without a count are skipped.
    """
    left_out = [f"{int(metrics[name]):,} {words}" for name, words in LEFT_OUT if metrics.get(name)]
    line = f"{num_samples:,} samples to train on"
    return f"{line} (left out: {', '.join(left_out)})" if left_out else line


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _tokens_per_s(value: float) -> str:
    return f"{value:,.0f}"


def _number(digits: int) -> Callable[[float], str]:
    """Fixed point, or an exponent where that would show only zeros."""
    smallest = 10.0**-digits
    return lambda value: f"{value:.{digits}f}" if value == 0 or abs(value) >= smallest else f"{value:.1e}"


# Metric, the words before it, its format; in the order of the line. A metric that is missing is skipped.
UPDATE_FIELDS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("reward/mean", "reward", _number(3)),
    ("pass_fraction", "pass", _percent),
    ("response_length/mean", "length", "{:.1f}".format),
    ("truncated_fraction", "truncated", _percent),
    ("loss", "loss", _number(4)),
    ("kl", "kl", _number(4)),
    ("policy_kl", "policy_kl", _number(4)),
    ("clip_fraction", "clip", _percent),
    ("entropy", "entropy", _number(3)),
    ("grad_norm", "grad_norm", _number(3)),
    ("lr", "lr", "{:.2e}".format),
    ("mismatch", "mismatch", "{:.1e}".format),
    ("canary", "canary", "{:.1e}".format),
    ("tokens_per_s", "tokens/s", _tokens_per_s),
    ("memory_gb", "memory_gb", "{:.2f}".format),
    ("cuda_memory_gb", "cuda_memory_gb", "{:.2f}".format),
)


def update_line(
    rollout_id: int,
    metrics: Mapping[str, float],
    *,
    num_rollouts: int | None = None,
    update: tuple[int, int] | None = None,
) -> str:
    """One readable line per update; metrics that are missing are skipped.

    Args:
        rollout_id: number of the rollout that was learned from.
        metrics: flat names to values. Names that start with "seconds/" are phases, listed in the order given.
        num_rollouts: rollouts in the whole run, where known.
        update: (2, 4) for the second of the rollout's four updates; left out: the rollout as a whole.
    """
    step = f"rollout_idx {rollout_id}" if num_rollouts is None else f"rollout_idx {rollout_id}/{num_rollouts}"
    if update is not None:
        step += f", update {update[0]}/{update[1]}"
    parts = [f"{words} {_shown(show, metrics[name])}" for name, words, show in UPDATE_FIELDS if name in metrics]
    phases = {
        name.removeprefix(SECONDS_PREFIX): value
        for name, value in metrics.items()
        if name.startswith(SECONDS_PREFIX) and math.isfinite(value)
    }
    if phases:
        listed = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.items())
        parts.append(f"{sum(phases.values()):.1f} s ({listed})")
    return f"{step}: " + " | ".join(parts)


# A loss this near 0 is one that only rounding keeps from it.
_ROUNDING = 1e-5


def first_update_line(metrics: Mapping[str, float]) -> str:
    """Why the loss of a run's first update is 0; empty where it is not, or where no gradient came of it.

    Args:
        metrics: of that update.
    """
    # Written so that NaN, or a metric that an algorithm of one's own does not have, is never near.
    is_near = abs(metrics.get("loss", math.nan)) <= _ROUNDING and abs(metrics.get("ratio", math.nan) - 1) <= _ROUNDING
    if not is_near or not metrics.get("grad_norm"):
        return ""
    return (
        "the loss of a first update is 0 by construction: the ratio is 1, and the advantages of a group sum to 0. Its "
        f"gradient is not 0 (norm {metrics['grad_norm']:.3g}), and that is what trains: watch the reward, not the loss"
    )


# "eval/greedy/prompts" is how many prompts "eval/greedy" is of, "eval/prompts" how many there are.
_PROMPTS = "/prompts"


def evaluation_line(rollout_id: int, metrics: Mapping[str, float]) -> str:
    """One line per evaluation."""
    rates = [f"{name} {_rate(name, metrics)}" for name in metrics if not name.endswith(_PROMPTS)]
    return f"evaluation at rollout_idx {rollout_id}: " + " | ".join(rates)


def _rate(name: str, metrics: Mapping[str, float]) -> str:
    """A pass rate, with how many prompts it is of where some could not be answered or judged."""
    rate, total = _shown("{:.3f}".format, metrics[name]), metrics.get(f"eval{_PROMPTS}", 0.0)
    num_prompts = metrics.get(name + _PROMPTS, total)
    return rate if num_prompts == total else f"{rate} (of {num_prompts:,.0f} of {total:,.0f} prompts)"


def evaluation_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Evaluation before and after training, as text: one row per metric that both have, with the change."""
    table = Table(title="Evaluation")
    table.add_column("metric")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for name, start in before.items():
        if name in after and not name.endswith(_PROMPTS):
            change = _shown("{:+.3f}".format, after[name] - start)
            table.add_row(name, _rate(name, before), _rate(name, after), change)
    text = io.StringIO()
    # A fixed width: the table must not depend on the terminal, for it goes into logs too.
    Console(file=text, width=100, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))


def _shown(show: Callable[[float], str], value: float) -> str:
    return show(value) if math.isfinite(value) else "-"


def _layout(settings: Settings, world_size: int) -> str:
    parallel = settings.parallel
    model_ranks = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    text = (
        f"{world_size} {'rank' if world_size == 1 else 'ranks'} = TP {parallel.tensor_model_parallel_size} "
        f"x PP {parallel.pipeline_model_parallel_size} x DP {world_size // model_ranks}"
    )
    switches = {
        "sequence parallel": parallel.sequence_parallel,
        "distributed optimizer": parallel.use_distributed_optimizer,
    }
    return ", ".join([text, *(name for name, on in switches.items() if on)])


def _sampling(rollout: RolloutConfig) -> str:
    count = rollout.rollout_num_workers
    workers = "" if count is None else f" on {count} worker{'s' if count > 1 else ''}"
    return (
        f"temperature {rollout.temperature:g}, top-k {rollout.top_k or 'off'}, "
        f"top-p {'off' if rollout.top_p == 1 else format(rollout.top_p, 'g')}, "
        f"up to {rollout.max_response_length:,} new tokens, engine {rollout.engine}{workers}"
    )


def _batch(settings: Settings) -> str:
    data, num_updates = settings.data, settings.algorithm.updates_per_rollout
    num_answers = data.rollout_batch_size * data.samples_per_prompt
    micro = (
        f"packed up to {data.max_tokens_per_microbatch:,} tokens"
        if data.micro_batch_size is None
        else f"of {data.micro_batch_size:,} padded samples"
    )
    text = (
        f"{data.rollout_batch_size:,} prompts x {data.samples_per_prompt} samples = {num_answers:,} answers a rollout"
    )
    if num_updates == 1:
        return f"{text}, all in 1 update, micro-batches {micro}"
    exactly = "" if data.rollout_batch_size % num_updates == 0 else "about "
    return f"{text}, in {num_updates} updates of {exactly}{num_answers // num_updates:,}, micro-batches {micro}"


def _algorithm(algorithm: AlgorithmConfig) -> str:
    parts = [algorithm.algorithm, f"clip {algorithm.clip_low:g}/{algorithm.clip_high:g}"]
    if algorithm.dual_clip is not None:
        parts.append(f"dual clip {algorithm.dual_clip:g}")
    parts.append(f"KL {algorithm.kl_type} x {algorithm.kl_coef:g}" if algorithm.kl_coef else "no KL")
    if algorithm.entropy_coef:
        parts.append(f"entropy bonus {algorithm.entropy_coef:g}")
    if not algorithm.normalize_advantages:
        parts.append("advantages not divided by the standard deviation")
    if algorithm.importance_correction != "off":
        parts.append(f"importance weights: {algorithm.importance_correction} at {algorithm.importance_bound:g}")
    if algorithm.old_logprobs == "rollout":
        parts.append("ratio to the rollout engine's log-probs")
    return ", ".join([*parts, algorithm.loss_aggregation])


def _optimizer(optimizer: OptimizerConfig) -> str:
    parts = [f"AdamW, lr {optimizer.lr:g} {optimizer.lr_decay_style}"]
    if optimizer.lr_warmup_iters:
        parts.append(f"{optimizer.lr_warmup_iters} warm-up updates")
    parts.append(f"weight decay {optimizer.weight_decay:g}")
    parts.append(f"gradients clipped at {optimizer.clip_grad:g}" if optimizer.clip_grad else "gradients not clipped")
    return ", ".join(parts)
