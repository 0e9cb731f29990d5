"""The demo's student and its data, as they are shipped."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from examples.arithmetic_problems import Problem, make_problems, to_row
from xrl.rewards import Judge, gsm8k, gsm8k_exact
from xrl.types import Prompt

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def read_problems(name: str) -> list[Problem]:
    rows = [json.loads(line) for line in (EXAMPLES / "data" / name).read_text().splitlines()]
    return [Problem(question=row["extra_info"]["question"], answer=row["extra_info"]["answer"]) for row in rows]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EXAMPLES / "student")


def test_same_seed_draws_the_same_problems() -> None:
    assert make_problems(50, seed=3) == make_problems(50, seed=3)


def test_excluded_problems_are_not_drawn_again() -> None:
    first = make_problems(200, seed=3)
    assert not {p.question for p in first} & {p.question for p in make_problems(200, seed=3, exclude=first)}


def test_every_step_of_a_worked_answer_is_true() -> None:
    for problem in make_problems(500, seed=0):
        *steps, final = problem.answer.splitlines()
        for step in steps:
            expression, _, value = step.partition("=")
            assert eval(expression) == int(value) >= 0
        assert final == f"#### {value}"
        assert problem.ground_truth == value


@pytest.mark.parametrize("judge", [gsm8k.judge, gsm8k_exact.judge])
def test_worked_answers_satisfy_both_rules(judge: Judge) -> None:
    for problem in make_problems(100, seed=0):
        prompt = Prompt(id=0, token_ids=[], text=problem.question, ground_truth=problem.ground_truth)
        assert judge(problem.answer, prompt) == 1


def test_training_and_evaluation_problems_are_disjoint() -> None:
    train, evaluation = read_problems("train.jsonl"), read_problems("eval.jsonl")
    assert (len(train), len(evaluation)) == (2560, 256)
    assert not {p.question for p in train} & {p.question for p in evaluation}


def test_shipped_rows_are_those_the_generator_writes() -> None:
    first = json.loads((EXAMPLES / "data" / "eval.jsonl").open().readline())
    assert first == to_row(read_problems("eval.jsonl")[0], split="test", index=0)
    assert first["data_source"] == "xrl/arithmetic"


def test_shipped_folder_stays_small() -> None:
    assert sum(path.stat().st_size for path in (EXAMPLES / "student").iterdir()) <= 4_000_000
    assert sum(path.stat().st_size for path in (EXAMPLES / "data").iterdir()) <= 1_500_000


@pytest.mark.parametrize(
    "text", ["Tom has 3 eggs.", "héllo wörld_foo 12,345", "日本 \N{GRINNING FACE}\t\n x", "٣ a  b"]
)
def test_tokenizer_writes_any_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerBase) -> None:
    digits = "".join(random.Random(0).choices("0123456789", k=40))
    assert len(tokenizer.encode(digits)) == 40


def test_every_token_has_a_row_in_the_model(tokenizer: PreTrainedTokenizerBase) -> None:
    config = json.loads((EXAMPLES / "student" / "config.json").read_text())
    assert len(tokenizer) <= config["vocab_size"]
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
