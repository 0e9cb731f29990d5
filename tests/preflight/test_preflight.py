"""A sound run passes quickly and without torch; what crosses sections is refused in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import Refusal, check, edit_json, run_flags, write_rows
from xrl.config.parse import parse_settings
from xrl.preflight import preflight


def test_sound_settings_pass(model: Path, data: Path, tmp_path: Path) -> None:
    check(model, data, tmp_path, "--eval-data", str(data))
    tensor_and_pipeline = ["--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2"]
    check(model, data, tmp_path, *tensor_and_pipeline, world_size=8)
    assert (tmp_path / "work").is_dir()


def test_checking_imports_no_torch(model: Path, data: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from xrl.config.parse import parse_settings; from xrl.preflight import preflight;"
        "preflight(parse_settings(sys.argv[1:]), world_size=1);"
        "print([name for name in ('torch', 'transformers', 'megatron', 'datasets') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, *run_flags(model, data, tmp_path)], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_unknown_engine_lists_the_known_ones(refusal: Refusal) -> None:
    sentence = refusal("--engine", "vllm")
    assert "--engine" in sentence and "'vllm'" in sentence and "embedded" in sentence


def test_unknown_judge_lists_the_known_ones(refusal: Refusal) -> None:
    sentence = refusal("--judge", "gsm9k")
    assert "--judge gsm9k" in sentence and "gsm8k-exact" in sentence and "math-verify" in sentence


def test_judge_of_a_missing_file_is_refused(refusal: Refusal) -> None:
    assert "no file" in refusal("--judge", "nowhere/judge.py:score")


def test_unknown_algorithm_lists_the_known_ones(refusal: Refusal) -> None:
    sentence = refusal("--algorithm", "ppo")
    assert "--algorithm" in sentence and "'ppo'" in sentence and "grpo" in sentence


def test_an_algorithm_of_ones_own_that_lacks_something_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class Mine:\n    def __init__(self, config): self.settings = config")
    sentence = refusal("--algorithm", f"{tmp_path}/mine.py:Mine")
    assert "Mine lacks score(), keep(), token_shares(), loss(), fused_loss: derive it from" in sentence


def test_prompt_and_response_longer_than_the_positions_are_refused(refusal: Refusal) -> None:
    sentence = refusal("--max-prompt-length", "200", "--max-response-length", "100")
    assert "200" in sentence and "100 = 300" in sentence and "256 positions" in sentence


def test_sharing_prompts_of_padded_micro_batches_is_refused(refusal: Refusal) -> None:
    assert "--micro-batch-size 4" in refusal("--share-prompt-prefix", "true", "--micro-batch-size", "4")


def test_sharing_prompts_in_transformer_engine_is_refused(refusal: Refusal) -> None:
    sentence = refusal("--share-prompt-prefix", "true", "--transformer-impl", "transformer_engine")
    assert "--share-prompt-prefix" in sentence and "--transformer-impl" in sentence


def test_one_sample_a_prompt_is_refused(refusal: Refusal) -> None:
    sentence = refusal("--samples-per-prompt", "1")
    assert sentence == "--samples-per-prompt must be >= 2 to form a group, got 1"


def test_sequence_parallel_without_tensor_parallel_is_refused(refusal: Refusal) -> None:
    assert "--tensor-model-parallel-size > 1" in refusal("--sequence-parallel")


def test_filtered_sampling_must_be_asked_for_knowingly(
    refusal: Refusal, model: Path, data: Path, tmp_path: Path
) -> None:
    sentence = refusal("--top-p", "0.9")
    assert "--top-p 0.9" in sentence and "biased" in sentence and "--allow-biased-sampling" in sentence
    check(model, data, tmp_path, "--top-p", "0.9", "--allow-biased-sampling")


def test_missing_dataset_is_refused(refusal: Refusal) -> None:
    assert "--data nowhere.jsonl does not exist" in refusal("--data", "nowhere.jsonl")


def test_empty_dataset_is_refused(refusal: Refusal, data: Path) -> None:
    data.write_text("")
    assert f"--data {data} is empty" in refusal()


def test_dataset_smaller_than_a_batch_is_refused(refusal: Refusal) -> None:
    sentence = refusal("--rollout-batch-size", "9")
    assert "8 rows" in sentence and "batch of 9" in sentence


def test_line_that_is_not_json_is_named(refusal: Refusal, data: Path) -> None:
    data.write_text('{"prompt": "1+1=?", "ground_truth": "2"}\n{"prompt": \n')
    assert f"{data}, line 2 is not JSON" in refusal("--rollout-batch-size", "1")


@pytest.mark.parametrize(
    ("row", "missing"), [({"ground_truth": "2"}, "`prompt`"), ({"prompt": "1+1=?"}, "ground truth")]
)
def test_row_without_prompt_or_ground_truth_is_named(
    refusal: Refusal, data: Path, row: dict[str, str], missing: str
) -> None:
    write_rows(data, [{"prompt": "1+1=?", "ground_truth": "2"}, {"prompt": "1+1=?", "ground_truth": "2"}, row])
    sentence = refusal("--rollout-batch-size", "1")
    assert f"{data}, line 3" in sentence and missing in sentence


def test_bad_evaluation_data_is_named_by_its_flag(refusal: Refusal) -> None:
    assert "--eval-data nowhere.jsonl does not exist" in refusal("--eval-data", "nowhere.jsonl")


def test_work_folder_that_cannot_be_written_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    # Below a file: no permission would stop a test that runs as root.
    (tmp_path / "file").touch()
    sentence = refusal("--work-dir", str(tmp_path / "file" / "work"))
    assert "--work-dir" in sentence and "written" in sentence


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_ground_truth_that_the_judge_cannot_use_is_refused_by_its_line(
    refusal: Refusal, tmp_path: Path, flag: str
) -> None:
    rows = [{"prompt": "a", "ground_truth": "2"}] * 7 + [{"prompt": "b", "ground_truth": "blue"}]
    sentence = refusal(flag, str(write_rows(tmp_path / "odd.jsonl", rows)))
    assert "odd.jsonl, line 8: the ground truth 'blue' is not a number: try --judge math-verify" in sentence


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_ground_truth_that_is_not_finite_is_refused_for_every_judge(refusal: Refusal, data: Path, literal: str) -> None:
    data.write_text(f'{{"prompt": "a", "ground_truth": {literal}}}\n' * 4)
    assert f"{data}, line 1 has the ground truth" in refusal("--judge", "math-verify")


@pytest.mark.parametrize("flag", ["--model", "--data", "--eval-data"])
def test_a_name_that_the_system_does_not_take_is_refused(refusal: Refusal, tmp_path: Path, flag: str) -> None:
    path = tmp_path / ("a" * 300 + ".jsonl")
    assert f"{path} cannot be read: File name too long" in refusal(flag, str(path))


CHAT = [{"prompt": [{"role": "user", "content": "1+1=?"}], "ground_truth": "2"}] * 8


def test_a_tokenizer_that_the_library_refuses_is_refused(refusal: Refusal, model: Path) -> None:
    edit_json(model / "tokenizer_config.json", eos_token=7)
    assert f"the tokenizer in {model} cannot be" in refusal()


def test_a_template_that_refuses_a_row_is_refused(refusal: Refusal, model: Path, data: Path) -> None:
    write_rows(data, CHAT)
    (model / "chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    assert refusal() == f"{data}, line 1: the model's chat template refuses the prompt: System role not supported"


def test_prompts_that_are_too_long_for_a_batch_are_refused(refusal: Refusal, data: Path) -> None:
    rows = [{"prompt": "1+1=?", "ground_truth": "2"}] * 3 + [{"prompt": "1" * 100, "ground_truth": "2"}] * 5
    write_rows(data, rows)
    assert f"--data {data} has 3 prompts of at most 32 tokens, fewer than --rollout-batch-size 4" in refusal()


def test_what_the_files_show_by_themselves_comes_first(refusal: Refusal, model: Path, data: Path) -> None:
    edit_json(model / "tokenizer_config.json", eos_token=7)
    write_rows(data, [*CHAT, {"prompt": "x"}])
    assert f"{data}, line 9 has no ground truth" in refusal()


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/a.jinja",
        "vocab.txt",
    ],
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(refusal: Refusal, model: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    assert refusal() == f"{model / name} is a pipe: a file is needed"


@pytest.mark.parametrize(
    ("name", "words"), [("config.json", "has no config.json"), ("tokenizer.json", "tokenizer.json is a pipe")]
)
def test_a_pipe_in_place_of_what_is_needed_is_not_waited_for(
    refusal: Refusal, model: Path, name: str, words: str
) -> None:
    (model / name).unlink()
    os.mkfifo(model / name)
    assert words in refusal()


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_data_in_a_pipe_is_refused(refusal: Refusal, tmp_path: Path, flag: str) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert f"{flag} {tmp_path}/pipe.jsonl is not a file" in refusal(flag, str(tmp_path / "pipe.jsonl"))


def test_ranks_of_a_checked_run_do_not_try_again(model: Path, data: Path, tmp_path: Path) -> None:
    edit_json(model / "tokenizer_config.json", eos_token=7)
    preflight(parse_settings(run_flags(model, data, tmp_path)), world_size=1, tries_out=False)
