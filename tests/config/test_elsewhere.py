"""Words of other projects: each is answered with flags that exist, on the command line and in YAML, nested too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xrl.config import SettingsError
from xrl.config.elsewhere import ELSEWHERE
from xrl.config.flags import FLAGS
from xrl.config.parse import parse_settings

NEEDED = ["--model", "m", "--data", "d.jsonl"]


def refusal(*arguments: str) -> str:
    with pytest.raises(SettingsError) as caught:
        parse_settings([*NEEDED, *arguments])
    return str(caught.value)


@pytest.mark.parametrize("word", ELSEWHERE)
def test_every_word_is_answered_with_flags_that_exist(word: str) -> None:
    assert word not in FLAGS
    assert refusal(f"--{word}=2").startswith(f"flag --{word} is unknown; ")
    for option in re.findall(r"--[a-z][a-z0-9-]*", ELSEWHERE[word]):
        name = option.removeprefix("--").replace("-", "_")
        assert name in FLAGS or name.removeprefix("no_") in FLAGS or name == "nproc_per_node", option


@pytest.mark.parametrize(
    ("flag", "ours"),
    [
        ("--global-batch-size", "--rollout-batch-size"),
        ("--tp", "--tensor-model-parallel-size"),
        ("--beta", "--kl-coef"),
        ("--model_name_or_path", "--model"),
        ("--actor_rollout_ref.rollout.n", "--samples-per-prompt"),
        ("--actor-rollout-ref.rollout.n", "--samples-per-prompt"),
        ("--data.train_batch_size", "--rollout-batch-size"),
        ("--trainer.seed", "--seed"),
    ],
)
def test_word_of_another_project_is_translated(flag: str, ours: str) -> None:
    assert f"flag {flag} is unknown; here it is {ours}" in refusal(flag, "2")


def test_what_there_is_not_is_said_to_be_missing() -> None:
    assert "--resume, with --run-dir" in refusal("--resume-from-checkpoint", "x")
    assert "metrics.jsonl" in refusal("--report-to", "wandb")


def test_one_word_may_mean_two_things() -> None:
    assert "here it is --rollout-batch-size (prompts)" in refusal("--data.train_batch_size", "8")
    assert "over --updates-per-rollout" in refusal("--train_batch_size", "8")


@pytest.mark.parametrize("word", ["actor_rollout_ref.rollout.n=8", "+actor_rollout_ref.rollout.n=8"])
def test_words_without_dashes_are_translated_too(word: str) -> None:
    assert refusal(word).endswith("is not a flag; here it is --samples-per-prompt")


@pytest.mark.parametrize(
    ("text", "line", "key", "ours"),
    [
        ("seed: 1\nnum_generations: 8\n", 2, "num_generations", "--samples-per-prompt"),
        ("data:\n  train_files: d.parquet\n", 2, "train_files", "--data"),
        ("actor_rollout_ref:\n  rollout:\n    mode: x\n    n: 8\n", 4, "actor_rollout_ref.rollout.n", "--samples"),
        ("rollout:\n  val_kwargs:\n    n: 8\n    rollout-top-p: 1\n", 4, "val_kwargs.rollout-top-p", "--top-p"),
        ("trainer:\n  total_epochs: 2\n", 2, "trainer.total_epochs", "--num-epochs"),
    ],
)
def test_keys_of_other_projects_are_translated_where_they_stand(
    tmp_path: Path, text: str, line: int, key: str, ours: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert f"{file}, line {line}: key {key!r} is unknown; here it is {ours}" in refusal("--config", str(file))


def test_nested_keys_that_nobody_knows_are_named_by_the_first(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("qqqq:\n  zzzz:\n    [a]: 1\n    xxxx: 1\n")
    assert refusal("--config", str(file)) == f"{file}, line 1: key 'qqqq' is unknown; --help-all lists all"
