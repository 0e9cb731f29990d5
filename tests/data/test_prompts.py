"""Prompts, their order, and the cursor."""

import copy
import json
import logging
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from xrl.config import SettingsError
from xrl.data import prompts
from xrl.data.prompts import PromptDataset
from xrl.types import Prompt

TEMPLATE = (
    "{% for message in messages %}user {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}bot{% endif %}"
)
NUM_ROWS = 7


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens; adds a token of its own in front, as some do, unless told not to."""
    words = ["[UNK]", "<s>", "user", "bot", *(f"w{i}" for i in range(10))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = cast(Any, PreTrainedTokenizerFast)(tokenizer_object=backend, unk_token="[UNK]", bos_token="<s>")
    tokenizer.chat_template = TEMPLATE
    return cast(PreTrainedTokenizerFast, tokenizer)


def write(folder: Path, prompts: list[Any]) -> Path:
    path = folder / "data.jsonl"
    rows = [
        {"prompt": prompt, "ground_truth": str(number), "extra_info": {"n": number}}
        for number, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), [chat(f"w{i}") for i in range(NUM_ROWS)])


def dataset(path: Path, tokenizer: Any, **changes: Any) -> PromptDataset:
    return PromptDataset(path, tokenizer, **{"max_prompt_length": 8, "seed": 0, "shuffle": True, **changes})


def ids(prompts: list[Prompt]) -> list[int]:
    return [prompt.id for prompt in prompts]


def test_prompt_is_the_chat_template_s_output(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = dataset(path, tokenizer).all()
    assert ids(prompts) == list(range(NUM_ROWS))
    expected: Any = tokenizer.apply_chat_template(chat("w3"), add_generation_prompt=True, return_dict=False)
    assert prompts[3] == Prompt(id=3, token_ids=expected, text="user w3 bot", ground_truth="3", extra={"n": 3})
    assert expected == [2, 7, 3]


def test_string_prompt_is_encoded_as_it_stands(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (prompt,) = dataset(write(tmp_path, ["w0 w1"]), tokenizer).all()
    assert (prompt.text, prompt.token_ids) == ("w0 w1", [4, 5])


def test_long_prompts_are_dropped_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, [chat("w0"), chat("w0 w1"), chat("w0 w1 w2")])
    with caplog.at_level(logging.WARNING):
        prompts = dataset(path, tokenizer, max_prompt_length=4)
    assert (ids(prompts.all()), len(prompts), prompts.num_dropped) == ([0, 1], 2, 1)
    assert "dropped 1 of 3 prompts longer than --max-prompt-length 4 tokens" in caplog.text
    with pytest.raises(SettingsError, match="no prompt within --max-prompt-length 2: the shortest has 3 tokens"):
        dataset(path, tokenizer, max_prompt_length=2)


def test_every_epoch_holds_each_prompt_once_in_an_order_of_its_own(
    path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = dataset(path, tokenizer)
    epochs = [ids(prompts.next_batch(NUM_ROWS)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(NUM_ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert ids(dataset(path, tokenizer).next_batch(NUM_ROWS)) == epochs[0]
    assert ids(dataset(path, tokenizer, seed=-1).next_batch(NUM_ROWS)) != epochs[0]


def test_unshuffled_prompts_come_in_file_order(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = dataset(path, tokenizer, shuffle=False)
    assert ids(prompts.next_batch(5)) == [0, 1, 2, 3, 4]
    assert prompts.epoch == 0
    assert ids(prompts.next_batch(5)) == [5, 6, 0, 1, 2]
    assert prompts.epoch == 1


def test_batch_larger_than_the_data_is_refused(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SettingsError, match="--rollout-batch-size 8 is more than the 7 prompts"):
        dataset(path, tokenizer).next_batch(8)


@pytest.fixture(scope="module")
def twins(path: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[PromptDataset, PromptDataset]:
    return dataset(path, tokenizer), dataset(path, tokenizer)


@given(before=st.lists(st.integers(1, NUM_ROWS), max_size=6), after=st.lists(st.integers(1, NUM_ROWS), max_size=6))
def test_resumed_cursor_gives_the_uninterrupted_run_s_prompts(
    twins: tuple[PromptDataset, PromptDataset], before: list[int], after: list[int]
) -> None:
    prompts, resumed = twins
    for size in before:
        prompts.next_batch(size)
    state = json.loads(json.dumps(prompts.state_dict()))
    uninterrupted = [ids(prompts.next_batch(size)) for size in after]
    resumed.load_state_dict(state)
    assert [ids(resumed.next_batch(size)) for size in after] == uninterrupted
    assert resumed.state_dict() == prompts.state_dict()


def test_cursor_of_other_data_or_another_seed_is_refused(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    state = dataset(path, tokenizer).state_dict()
    assert state == {"epoch": 0, "position": 0, "seed": 0, "num_prompts": NUM_ROWS}
    with pytest.raises(SettingsError, match="had 8 prompts, .* has 7"):
        dataset(path, tokenizer).load_state_dict({**state, "num_prompts": 8})
    with pytest.raises(SettingsError, match="shuffled with --seed 0, this one with 1"):
        dataset(path, tokenizer, seed=1).load_state_dict(state)


def test_chat_messages_need_a_chat_template(
    path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(SettingsError, match="has no chat template"):
        dataset(path, tokenizer)


def test_prompt_that_the_template_refuses_is_named(
    path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no users here') }}")
    with pytest.raises(SettingsError, match="line 1: the model's chat template refuses the prompt: no users here"):
        dataset(path, tokenizer)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"rag": TEMPLATE, "tool_use": TEMPLATE}, r"chat templates of .* \(rag, tool_use\) none is called default"),
        ("{% for message in messages %}", "has a chat template with an error in line 1"),
        ("{{ messages[0]['content'] + 1 }}", "line 1: the model's chat template refuses the prompt: "),
        ("{{ messages[5]['content']['x'] }}", "line 1: the model's chat template refuses the prompt: "),
        ("{{ raise_exception('') }}", "line 1: the model's chat template refuses the prompt: TemplateError"),
        ("{# nothing #}", "line 1: the prompt has no tokens"),
        (
            "{{ messages[0]['content'] }} \ud83d",
            r"line 1: the model's chat template gives \\ud83d, half of a character",
        ),
    ],
)
def test_a_template_that_gives_no_prompt_is_one_sentence(
    template: Any, words: str, path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(SettingsError, match=words) as caught:
        dataset(path, tokenizer)
    assert "\n" not in str(caught.value)


def test_the_default_of_several_templates_is_taken(
    path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", {"default": TEMPLATE, "rag": "{{ raise_exception('no') }}"})
    assert dataset(path, tokenizer).all()[3].text == "user w3 bot"


def test_a_string_without_tokens_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SettingsError, match="line 2: the prompt has no tokens"):
        dataset(write(tmp_path, ["w0", "  "]), tokenizer)


def test_a_template_that_loops_is_one_sentence(
    path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "TEMPLATE_LIMIT_S", 0.05)
    endless = copy.copy(tokenizer)
    endless.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(SettingsError, match="line 1: the model's chat template has not ended after 0.05 s"):
        dataset(path, endless)


def test_a_token_that_the_model_lacks_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    larger = copy.deepcopy(tokenizer)
    vocab_size = len(larger)
    larger.add_special_tokens({"pad_token": "<new>"})
    harmless = dataset(write(tmp_path, ["w1 w2", "w3"]), larger)
    harmless.check_ids(larger, vocab_size=vocab_size)
    beyond = dataset(write(tmp_path, ["w1", "w2 <new>"]), larger)
    beyond.check_ids(larger, vocab_size=vocab_size + 1)
    with pytest.raises(SettingsError, match=f"'<new>', which .* adds as id {vocab_size}, .* is {vocab_size}"):
        beyond.check_ids(larger, vocab_size=vocab_size)
