"""What a worker is told: defaults, and each flag that cannot be, in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xrl.config import SettingsError
from xrl.rollout.worker_flags import embedded_options, parse_worker_flags

OWN = "tests.rollout.scripted_engine:make"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({}))
    return tmp_path


def test_a_model_and_a_length_are_enough(model: Path) -> None:
    flags = parse_worker_flags(["--model", str(model), "--max-model-len", "32"])
    assert (flags.model, flags.max_model_len, flags.engine, flags.dtype, flags.device) == (
        *(model, 32),
        *("embedded", "float32", "cpu"),
    )
    # Nobody else's host may call it, on a port that is free, and it ends with nobody.
    assert (flags.host, flags.port, flags.key_file, flags.parent_pid) == ("127.0.0.1", 0, None, None)
    assert (flags.max_batch_size, flags.num_threads, flags.num_workers_on_host) == (1024, 1, 1)


def test_a_trainer_tells_its_worker_on_whose_behalf_it_lives(model: Path) -> None:
    more = ["--parent-pid", "77", "--num-workers-on-host", "3", "--port", "65535", "--key-file", "a key"]
    flags = parse_worker_flags(["--model", str(model), "--max-model-len=32", *more])
    assert (flags.parent_pid, flags.num_workers_on_host, flags.port) == (77, 3, 65535)
    assert flags.key_file == Path("a key")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--max-model-len", "0"], "--max-model-len must be >= 1, got 0"),
        (["--max-batch-size", "-1"], "--max-batch-size must be >= 1, got -1"),
        (["--num-threads", "0"], "--num-threads must be >= 1, got 0"),
        (["--num-workers-on-host", "0"], "--num-workers-on-host must be >= 1, got 0"),
        (["--num-threads", "two"], "argument --num-threads: invalid int value: 'two'"),
        (["--port", "-1"], r"--port must be in \[0, 65535\], got -1"),
        (["--port", "65536"], r"--port must be in \[0, 65535\], got 65536"),
        (["--engine", "embeded"], r"--engine 'embeded' is unknown \(the nearest is embedded\)"),
        (["--engine", "no_such_module:make"], "there is no module no_such_module to import"),
        (["--kv-cache-gb", "0"], "--kv-cache-gb must be > 0, got 0"),
        (["--kv-cache-gb", "-2"], "--kv-cache-gb must be > 0, got -2"),
        (["--kv-cache-gb", "inf"], "--kv-cache-gb must be > 0, got inf"),
        (["--kv-cache-gb", "nan"], "--kv-cache-gb must be > 0, got nan"),
        (["--kv-cache-gb", "1", "--engine", "turbomind"], "bounds the embedded engine, --engine turbomind has its own"),
        (["--kv-cache-gb", "1", "--engine", OWN], "--kv-cache-gb bounds the embedded engine"),
        (["--max-batch", "5", "--modle", "x"], "flag --modle is unknown; the nearest is --model"),
    ],
)
def test_a_flag_that_cannot_be_is_one_sentence(model: Path, more: list[str], words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        parse_worker_flags(["--model", str(model), "--max-model-len", "32", *more])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ["embedded", "turbomind", "lmdeploy"])
def test_our_engines_read_a_hugging_face_folder(tmp_path: Path, engine: str) -> None:
    with pytest.raises(SettingsError, match=f"--model {tmp_path} has no config.json: give a Hugging Face folder"):
        parse_worker_flags(["--model", str(tmp_path), "--max-model-len", "32", "--engine", engine])


def test_an_engine_of_ones_own_may_read_something_else(tmp_path: Path) -> None:
    flags = parse_worker_flags(["--model", str(tmp_path / "weights.gguf"), "--max-model-len=32", "--engine", OWN])
    assert flags.engine == OWN
    assert embedded_options(flags) == {}


def test_what_is_needed_and_not_given_is_named() -> None:
    with pytest.raises(SettingsError, match="required: --model, --max-model-len"):
        parse_worker_flags([])


def test_a_model_whose_name_is_too_long_is_told_as_the_system_tells_it() -> None:
    with pytest.raises(SettingsError, match="cannot be read: File name too long"):
        parse_worker_flags(["--model", "x" * 300, "--max-model-len", "32"])


@pytest.mark.parametrize(("more", "num_bytes"), [([], None), (["--kv-cache-gb", "1.5"], 1_500_000_000)])
def test_the_embedded_engine_is_told_of_its_cache(model: Path, more: list[str], num_bytes: int | None) -> None:
    flags = parse_worker_flags(["--model", str(model), "--max-model-len=32", "--num-workers-on-host=2", *more])
    assert embedded_options(flags) == {"kv_cache_bytes": num_bytes, "num_workers_on_host": 2}
