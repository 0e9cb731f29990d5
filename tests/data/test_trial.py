"""What rank 0 would refuse is refused before there is a rank 0, whatever the libraries raise."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import edit_json, write_rows
from tests.tiny_models import make_tokenizer
from xrl.config import SettingsError
from xrl.data import prompts, trial
from xrl.data.prompts import PromptDataset
from xrl.data.tokenizer import load_tokenizer
from xrl.data.trial import Question, Trial, answer_to

CHAT = [{"prompt": [{"role": "user", "content": f"{n}+1=?"}], "ground_truth": str(n + 1)} for n in range(8)]
VOCAB_SIZE = 98


@pytest.fixture
def question(tmp_path: Path) -> Question:
    model = tmp_path / "model"
    make_tokenizer(model, VOCAB_SIZE)
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": 2}))
    return Question(
        model=str(model),
        vocab_size=VOCAB_SIZE,
        data=str(write_rows(tmp_path / "train.jsonl", CHAT)),
        eval_data=str(write_rows(tmp_path / "eval.jsonl", CHAT[:3])),
        max_prompt_length=64,
    )


def refusal(question: Question, **changes: Any) -> str:
    found = answer_to(Question(**{**vars(question), **changes}))
    assert list(found) == ["refused"]
    return str(found["refused"])


def test_prompts_that_are_short_enough_are_counted_in_a_process_of_their_own(question: Question) -> None:
    with Trial(question) as tried:
        assert tried.num_prompts() == 8


def test_warnings_of_libraries_are_no_reason_to_refuse(question: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    with Trial(question) as tried:
        assert tried.num_prompts() == 8


def test_what_the_process_refuses_is_refused(question: Question, tmp_path: Path) -> None:
    edit_json(tmp_path / "model" / "tokenizer_config.json", model_max_length="long")
    with Trial(question) as tried, pytest.raises(SettingsError, match="the tokenizer in .*model cannot be used"):
        tried.num_prompts()


def test_it_needs_no_torch(question: Question) -> None:
    """And says the same as with it: what is tried here is what rank 0 does with torch."""
    program = (
        "import json, sys; from xrl.data.trial import Question, leave_torch_alone, answer_to; leave_torch_alone();"
        "print(json.dumps([answer_to(Question(**json.loads(sys.argv[1]))), 'torch.nn' in sys.modules]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, json.dumps(vars(question))], capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout) == [answer_to(question), False]


DAMAGES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "vocabulary that is none": ("tokenizer.json", lambda t: t | {"model": t["model"] | {"vocab": None}}, "cannot be"),
    "added tokens that are none": ("tokenizer.json", lambda t: t | {"added_tokens": 5}, "cannot be"),
    "unknown kind": ("tokenizer.json", lambda t: t | {"model": {"type": "none"}}, "cannot be"),
    "class that is none": ("tokenizer_config.json", lambda t: t | {"tokenizer_class": 3}, "cannot be"),
    "length that is none": ("tokenizer_config.json", lambda t: t | {"model_max_length": "x"}, "cannot be"),
    "end that is none": ("tokenizer_config.json", lambda t: t | {"eos_token": 7}, "cannot be"),
    "end that is an object": ("tokenizer_config.json", lambda t: t | {"eos_token": {"content": 1}}, "cannot be"),
    "template that is none": ("tokenizer_config.json", lambda t: t | {"chat_template": 5}, "chat template"),
    "end that the model lacks": (
        "tokenizer_config.json",
        lambda t: t | {"eos_token": "<new>"},
        "eos_token '<new>' has id 98, but the model's vocab_size is 98",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_tokenizers_are_one_sentence(question: Question, name: str, tmp_path: Path) -> None:
    file, damage, words = DAMAGES[name]
    if "template" in name:
        (tmp_path / "model" / "chat_template.jinja").unlink()
    path = tmp_path / "model" / file
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    said = refusal(question)
    assert words in said and str(tmp_path) in said and said.isprintable()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no\nxrl: error: \x1b[2J') }}", "train.jsonl, line 1: the model's chat template refuses"),
        ("{% for %}", "has a chat template with an error in line 1"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "not ended after 0.05 s"),
        ("", "train.jsonl, line 1: the prompt has no tokens"),
    ],
)
def test_the_chat_template_is_tried(
    question: Question, tmp_path: Path, template: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "TEMPLATE_LIMIT_S", 0.05)
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    said = refusal(question)
    assert words in said and said.isprintable()


def test_both_data_files_are_tried(question: Question, tmp_path: Path) -> None:
    assert "no prompt within --max-prompt-length 1: the shortest has " in refusal(question, max_prompt_length=1)
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% if '2+' in messages[0].content %}{{ raise_exception('no') }}{% endif %}x"
    )
    assert "train.jsonl, line 3: " in refusal(question)
    assert "eval.jsonl, line 3: " in refusal(question, data=str(write_rows(tmp_path / "other.jsonl", CHAT[:2])))


def test_only_the_start_of_a_long_file_is_tried(question: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MOST_ROWS", 4)
    assert answer_to(question) == {"num_prompts": None}
    monkeypatch.setattr(trial, "MOST_ROWS", 9)
    assert answer_to(question) == {"num_prompts": 8}


def test_a_trial_that_does_not_end_in_time_is_one_sentence(question: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "DEADLINE_S", 0.01)
    with (
        Trial(question) as tried,
        pytest.raises(SettingsError, match="model was not loaded and tried out within 0.01 s"),
    ):
        tried.num_prompts()


def test_memory_is_bounded(question: Question) -> None:
    """A file that makes a library ask for more memory than there is ends the trial, not the machine."""
    program = (
        "import json, sys; from xrl.data import trial; trial.MEMORY_BYTES = 2**30\n"
        "trial.bound_memory(trial.Question(**json.loads(sys.argv[1])))\n"
        "try: bytearray(2**31)\n"
        "except MemoryError: print('bounded')"
    )
    found = subprocess.run([sys.executable, "-c", program, json.dumps(vars(question))], capture_output=True, text=True)
    assert found.stdout == "bounded\n"


def test_what_passes_is_what_the_run_loads(question: Question) -> None:
    tokenizer = load_tokenizer(Path(question.model))
    loaded = PromptDataset(Path(question.data), tokenizer, max_prompt_length=64, seed=0, shuffle=True)
    assert answer_to(question) == {"num_prompts": len(loaded)}
