"""Console lines."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from xrl.config import AlgorithmConfig, DataConfig, ModelConfig, ParallelConfig, Settings
from xrl.metrics.report import (
    evaluation_line,
    evaluation_table,
    first_update_line,
    prepared_line,
    rollout_finished_line,
    start_lines,
    update_line,
)

SETTINGS = Settings(
    model=ModelConfig(model=Path("/models/Qwen3-8B")),
    data=DataConfig(data=Path("train.jsonl"), max_tokens_per_microbatch=32768),
)


def start(settings, world_size=1):
    lines = start_lines(settings, world_size=world_size, num_prompts=7473, num_rollouts=58)
    return dict(line.split(": ", 1) for line in lines)


def test_lines_after_a_rollout_name_its_answers_and_count_its_samples():
    path = Path("work_dir/20250907094728/rollout_idx_1_trajectory.jsonl")
    assert rollout_finished_line(1, path) == f"rollout_idx 1 finished, saved trajectories to {path}"
    assert prepared_line(1024, {}) == "1,024 samples to train on"


def test_what_is_left_out_is_counted():
    metrics = {"groups/zero_variance": 3.0, "groups/too_small": 0.0, "samples/failed": 2.0}
    line = prepared_line(1000, metrics)
    assert line == "1,000 samples to train on (left out: 3 groups of equal rewards, 2 failed answers)"


def test_answers_that_nobody_could_judge_are_said():
    line = prepared_line(6, {"samples/failed": 3.0, "samples/unjudged": 2.0})
    assert line.endswith("(left out: 3 failed answers, 2 of these that nobody could judge)")


def test_rates_of_fewer_prompts_than_there_are_say_so():
    metrics = {"eval/greedy": 0.4831, "eval/pass@1": 0.5, "eval/prompts": 1319.0}
    metrics |= {"eval/greedy/prompts": 1004.0, "eval/pass@1/prompts": 1319.0}
    line = evaluation_line(0, metrics)
    assert line == ("evaluation at rollout_idx 0: eval/greedy 0.483 (of 1,004 of 1,319 prompts) | eval/pass@1 0.500")
    table = evaluation_table(metrics, {**metrics, "eval/greedy": math.nan, "eval/greedy/prompts": 0.0})
    assert "(of 1,004 of 1,319 prompts)" in table and "- (of 0 of 1,319 prompts)" in table
    assert "/prompts" not in table


def test_update_line_shows_what_is_there_in_one_line():
    metrics = {
        "reward/mean": 0.5,
        "response_length/mean": 83.14,
        "kl": 2e-6,
        "clip_fraction": 0.0123,
        "entropy": 0.4321,
        "grad_norm": 0.81,
        "lr": 1e-6,
        "mismatch": 2.1e-7,
        "tokens_per_s": 12345.6,
        "seconds/rollout": 5.0,
        "seconds/update": 2.5,
        "memory_gb": 1.5,
        "unknown": 3.0,
    }
    assert update_line(3, metrics, num_rollouts=58) == (
        "rollout_idx 3/58: reward 0.500 | length 83.1 | kl 2.0e-06 | clip 1.2% | entropy 0.432 | grad_norm 0.810 | "
        "lr 1.00e-06 | mismatch 2.1e-07 | tokens/s 12,346 | memory_gb 1.50 | 7.5 s (rollout 5.0, update 2.5)"
    )


def test_update_line_survives_missing_and_undefined_values():
    assert update_line(1, {}) == "rollout_idx 1: "
    assert update_line(1, {"reward/mean": math.nan, "loss": 0.0}) == "rollout_idx 1: reward - | loss 0.0000"
    assert update_line(1, {"loss": math.inf, "seconds/update": math.nan}) == "rollout_idx 1: loss -"


def test_start_says_layout_sampling_and_batch_words():
    lines = start(SETTINGS)
    assert lines["layout"] == "1 rank = TP 1 x PP 1 x DP 1"
    assert lines["data"] == "train.jsonl, 7,473 prompts, 58 rollouts"
    assert lines["sampling"] == ("temperature 1, top-k off, top-p off, up to 1,024 new tokens, engine embedded")
    assert lines["batch"] == (
        "128 prompts x 8 samples = 1,024 answers a rollout, all in 1 update, micro-batches packed up to 32,768 tokens"
    )
    assert lines["algorithm"] == "grpo, clip 0.2/0.2, no KL, token-mean"


def test_start_names_the_switches_that_are_on():
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        sequence_parallel=True,
        use_distributed_optimizer=True,
    )
    algorithm = AlgorithmConfig(
        clip_high=0.28, dual_clip=10, kl_coef=0.001, updates_per_rollout=3, importance_correction="mask"
    )
    lines = start(dataclasses.replace(SETTINGS, parallel=parallel, algorithm=algorithm), world_size=8)
    assert lines["layout"] == "8 ranks = TP 2 x PP 2 x DP 2, sequence parallel, distributed optimizer"
    assert "in 3 updates of about 341" in lines["batch"]
    assert lines["algorithm"] == (
        "grpo, clip 0.2/0.28, dual clip 10, KL k3 x 0.001, importance weights: mask at 2, token-mean"
    )


def test_table_compares_what_both_evaluations_have():
    table = evaluation_table({"pass@1": 0.25, "greedy pass@1": 0.5, "gone": 1.0}, {"pass@1": 0.5, "greedy pass@1": 0.4})
    (row,) = [line for line in table.split("\n") if "greedy" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["greedy pass@1", "0.500", "0.400", "-0.100"]
    assert "+0.250" in table
    assert "gone" not in table


def test_evaluation_has_a_line_of_its_own():
    assert (
        evaluation_line(0, {"pass@1": 0.25, "pass@4": 0.5})
        == "evaluation at rollout_idx 0: pass@1 0.250 | pass@4 0.500"
    )


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.001, 1234.5, -3e-7])
def test_numbers_never_show_as_zero_unless_they_are(value):
    shown = update_line(1, {"kl": value}).split()[-1]
    assert (float(shown) == 0) == (value == 0)


def test_update_line_of_one_of_several_updates_says_which():
    assert update_line(3, {"loss": 0.5}, num_rollouts=9, update=(2, 4)) == "rollout_idx 3/9, update 2/4: loss 0.5000"


FIRST_UPDATE = {"loss": -3.5e-9, "ratio": 1.0, "grad_norm": 0.81}


def test_loss_0_of_a_first_update_is_explained():
    assert "0 by construction" in first_update_line(FIRST_UPDATE)
    assert "norm 0.81" in first_update_line(FIRST_UPDATE)


@pytest.mark.parametrize(
    "other",
    [
        {"loss": 0.02},  # answers of different lengths, each token counting the same
        {"ratio": 1.1},  # to log-probs of other weights
        {"grad_norm": 0.0},  # nothing is learned, and that has its own warning
        {"loss": math.nan},
    ],
)
def test_loss_that_is_not_0_by_construction_is_not_explained(other):
    assert first_update_line(FIRST_UPDATE | other) == ""
    assert first_update_line({}) == ""
