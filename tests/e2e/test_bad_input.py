"""What a user sees of bad input: one line on stderr, exit code 2, no traceback, and soon."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import edit_json, run_flags, write_rows
from tests.tiny_models import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def flags(model: Path, tmp_path: Path) -> list[str]:
    data = write_rows(tmp_path / "train.jsonl", [{"prompt": "1+1=?", "ground_truth": "2"}] * 8)
    return run_flags(model, data, tmp_path)


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # A run of one rank, whatever this test was started by.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        inherited.pop(name, None)
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=inherited | variables, timeout=120
    )


def assert_refused(found: subprocess.CompletedProcess[str], *words: str) -> None:
    assert found.returncode == 2, found.stderr
    (line,) = found.stderr.splitlines()
    assert line.startswith("xrl: error: ")
    for word in words:
        assert word in line
    assert found.stdout == ""


def test_unknown_flag(flags: list[str]) -> None:
    found = run("-m", "xrl.train", *flags, "--rollout-batch-sise", "4")
    assert_refused(found, "--rollout-batch-sise is unknown", "--rollout-batch-size")


def test_unknown_yaml_key(flags: list[str], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("optimizer:\n  lrr: 1\n")
    assert_refused(run("-m", "xrl.train", *flags, "--config", str(config)), f"{config}, line 2", "--lr")


def test_missing_model(flags: list[str]) -> None:
    assert_refused(run("-m", "xrl.train", *flags, "--model", "nowhere"), "--model nowhere does not exist")


def test_world_size_that_does_not_fit(flags: list[str]) -> None:
    found = run("-m", "xrl.train", *flags, "--tensor-model-parallel-size", "2", WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
    assert_refused(found, "does not divide the 3 ranks", "2 or 4 ranks")


def test_bad_row_of_data(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=?"}\n')
    assert_refused(run("-m", "xrl.train", *flags), "train.jsonl, line 1 has no ground truth")
    assert not (tmp_path / "work").exists()


def test_the_command_refuses_before_it_starts_ranks(flags: list[str]) -> None:
    found = run("-m", "xrl.cli", "train", "--nproc-per-node", "4", *flags, "--tensor-model-parallel-size", "4")
    assert_refused(found, "--tensor-model-parallel-size 4", "1 or 2 would work")


def test_worker_without_a_model() -> None:
    found = run("-m", "xrl.cli", "worker", "--model", "nowhere", "--max-model-len", "8")
    assert_refused(found, "--model nowhere has no config.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('System role \x1b[2J not supported') }}", "refuses the prompt: System role \\x1b[2J not"),
        ("", "the prompt has no tokens"),
    ],
)
def test_chat_template_is_tried_before_anything_is_started(
    flags: list[str], model: Path, tmp_path: Path, template: str, words: str
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "model"))
    (other / "chat_template.jinja").write_text(template)
    write_rows(tmp_path / "train.jsonl", [{"prompt": [{"role": "user", "content": "1"}], "ground_truth": "2"}] * 8)
    assert_refused(run("-m", "xrl.train", *flags, "--model", str(other)), words)
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_tokenizer_is_tried_before_ranks_are_started(flags: list[str], model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "model"))
    edit_json(other / "tokenizer_config.json", eos_token=7)
    found = run("-m", "xrl.cli", "train", "--nproc-per-node", "2", *flags, "--model", str(other))
    assert_refused(found, f"the tokenizer in {other} cannot be")


@pytest.mark.parametrize("text", ["99999", "²", "٣", "1_0", "+2", "1" * 5000], ids=lambda text: ascii(text[:9]))
def test_no_odd_number_of_ranks_is_started(flags: list[str], text: str) -> None:
    assert_refused(run("-m", "xrl.cli", "train", "--nproc-per-node", text, *flags), "--nproc-per-node ")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_folders_that_hold_pipes_are_answered_by_every_command(flags: list[str], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "pipes"
    folder.mkdir()
    for other in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / other).write_text("{}")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert_refused(run("-m", "xrl.cli", "train", *flags, "--model", str(folder)))
    assert_refused(run("-m", "xrl.cli", "convert", "--from", str(folder), "--to", str(tmp_path / "to")))


@pytest.mark.distributed
@pytest.mark.slow
def test_what_a_rank_refuses_is_bad_input_of_the_whole_command(flags: list[str]) -> None:
    program = (
        "import sys; from xrl.launch.torchrun import run_ranks; "
        "from xrl.metrics.ending import note_end_of_ranks as note, words_of_ranks as words; "
        "sys.exit(run_ranks(sys.argv[1:], num_ranks=2, words_of_ranks=words, note_end_of_ranks=note))"
    )
    found = run("-c", program, *flags, "--lr", "-1")
    assert_refused(found, "--lr and --min-lr need 0 <= min-lr <= lr, got lr -1")


@pytest.mark.distributed
@pytest.mark.slow
def test_ranks_of_torchrun_say_it_once(flags: list[str]) -> None:
    """torchrun exits with 1 and reports the failure in its own way; ours is one line among that."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "xrl.train"]
    found = run(*torchrun, *flags, "--tensor-model-parallel-size", "4")
    assert found.returncode == 1
    lines = [line for line in found.stderr.splitlines() if line.startswith("xrl: error: ")]
    assert len(lines) == 1 and "does not divide the 2 ranks" in lines[0]
