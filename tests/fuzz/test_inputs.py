"""Damaged files: each is one printable sentence, or taken by the check and by the run alike."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.conftest import Fuzz
from tests.fuzz.damage import ODD_VALUES, damaged_bytes, damaged_json, damaged_value
from tests.small_runs import run_flags, write_rows
from tests.tiny_models import FAMILIES, make_checkpoint
from xrl.config import SettingsError
from xrl.config.errors import unreadable_files_refused
from xrl.config.flags import FLAGS
from xrl.config.json_file import read_json_object
from xrl.config.parse import dump_settings, parse_settings
from xrl.data.rows import check_dataset, load_rows
from xrl.data.trial import Question, answer_to
from xrl.models.checks import checked_shape
from xrl.models.shape import ModelShape, read_model_shape
from xrl.preflight.tokenizer import check_tokenizer
from xrl.preflight.weights import check_weights
from xrl.weights.hf_files import HuggingFaceReader

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"{n}+1=?"}],
        "reward_model": {"style": "rule", "ground_truth": str(n + 1)},
        "data_source": "sums",
        "extra_info": {"n": n, "of": [1, 2]},
    }
    for n in range(4)
]
YAML = """\
# A run.
data:
  rollout_batch_size: 4
  samples_per_prompt: 2
optimizer:
  lr: 1e-6
run:
  save_interval: null
  tensorboard: false
judge: gsm8k
"""


@pytest.fixture(scope="module", params=[None, 150_000], ids=["one file", "shards"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), tied=False, max_shard_bytes=request.param)


def outcome(check: Callable[[], object]) -> str:
    """`taken`, or `refused` in a sentence that can be printed."""
    try:
        check()
    except SettingsError as error:
        sentence = str(error)
        assert sentence.isprintable() and sentence.strip() and len(sentence) < 10_500, ascii(sentence)
        return "refused"
    return "taken"


def assert_both(found: Counter[str]) -> None:
    """Damage that is always refused, or never, would show little."""
    assert found["taken"] and found["refused"], found


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json(fuzz: Fuzz, tmp_path: Path, family: str) -> None:
    file = make_checkpoint(tmp_path, family=family, with_tokenizer=False) / "config.json"
    content, rng, found = file.read_bytes(), fuzz.random(), Counter[str]()

    def check() -> None:
        assert isinstance(checked_shape(read_json_object(file), file), ModelShape)
        read_model_shape(tmp_path)

    for _ in range(fuzz.num_cases(60)):
        file.write_bytes(damaged_json(rng, content))
        found[outcome(check)] += 1
    assert_both(found)


def test_data(fuzz: Fuzz, tmp_path: Path) -> None:
    file, rng, found = tmp_path / "train.jsonl", fuzz.random(), Counter[str]()
    content = write_rows(file, ROWS).read_bytes()

    def check() -> None:
        assert check_dataset(file, min_rows=1) == len(load_rows(file))

    for _ in range(fuzz.num_cases(400)):
        lines = content.splitlines(keepends=True)
        place = rng.randrange(len(lines))
        lines[place] = json.dumps(damaged_value(rng, ROWS[place])).encode() + b"\n"
        file.write_bytes(damaged_bytes(rng, content) if rng.random() < 0.3 else b"".join(lines))
        found[outcome(check)] += 1
    assert_both(found)


def test_settings_in_a_file(fuzz: Fuzz, tmp_path: Path) -> None:
    file, rng, found = tmp_path / "run.yaml", fuzz.random(), Counter[str]()
    names = list(FLAGS)

    def check() -> None:
        settings = parse_settings(["--model", "m", "--data", "d.jsonl", "--config", str(file)])
        dumped = tmp_path / "dumped.yaml"
        dumped.write_text(dump_settings(settings))
        assert parse_settings(["--config", str(dumped)]) == settings

    for _ in range(fuzz.num_cases(40)):
        value = json.dumps(rng.choice(ODD_VALUES))
        text = YAML.replace("judge: gsm8k", f"{rng.choice(names)}: {value}").encode()
        file.write_bytes(damaged_bytes(rng, text) if rng.random() < 0.4 else text)
        found[outcome(check)] += 1
    assert_both(found)


def test_weights(fuzz: Fuzz, model: Path, tmp_path: Path) -> None:
    rng, found = fuzz.random(), Counter[str]()
    damaged = Path(shutil.copytree(model, tmp_path / "model"))
    shape = read_model_shape(model)
    file = sorted(damaged.glob("*.safetensors"))[0]
    index = damaged / "model.safetensors.index.json"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")

    @unreadable_files_refused()  # as around every command
    def check() -> None:
        check_weights(damaged, shape)
        with HuggingFaceReader(damaged) as reader:
            for name, (size, _) in reader.tensors().items():
                assert tuple(reader.read(name, 0, 0, size[0]).shape) == size

    for case in range(fuzz.num_cases(60)):
        shutil.copytree(model, damaged, dirs_exist_ok=True)
        if index.exists() and case % 2:
            index.write_bytes(damaged_json(rng, index.read_bytes()))
        elif case % 5:
            header = damaged_json(rng, content[8:end])
            file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
        else:
            file.write_bytes(damaged_bytes(rng, content[: end + 10]) + content[end + 10 :])
        found[outcome(check)] += 1
    assert found["refused"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_tokenizer(fuzz: Fuzz, tmp_path: Path, name: str) -> None:
    """What the check of the files takes, the libraries take, or it is a sentence as well."""
    model = make_checkpoint(tmp_path / "model")
    question = Question(
        model=str(model),
        vocab_size=98,
        data=str(write_rows(tmp_path / "train.jsonl", ROWS)),
        eval_data=None,
        max_prompt_length=64,
    )
    rng, found = fuzz.random(), Counter[str]()
    content = (model / name).read_bytes()

    def check() -> None:
        check_tokenizer(model, vocab_size=98)
        answer = answer_to(question)
        if "refused" in answer:
            raise SettingsError(answer["refused"])
        assert answer == {"num_prompts": 4}

    for _ in range(fuzz.num_cases(40)):
        (model / name).write_bytes(damaged_json(rng, content))
        found[outcome(check)] += 1
    assert_both(found)


def test_flags(fuzz: Fuzz, tmp_path: Path) -> None:
    """On a command line, where no byte is 0."""
    rng, found = fuzz.random(), Counter[str]()
    odd = [str(value)[:6000] for value in ODD_VALUES if value not in (10**400, "a\0b", "\ud800")]
    odd += ["²", "٣", "１２", "1_000", "+5", " 5", "9" * 5000, "a:²", "[::1]:80", "--", "-", "=", "x=y", "../x"]
    flags = run_flags(tmp_path, tmp_path, tmp_path)
    for _ in range(fuzz.num_cases(150)):
        option = rng.choice([flag.option for flag in FLAGS.values()])
        words = rng.choice([[option, rng.choice(odd)], [f"{option}={rng.choice(odd)}"], [rng.choice(odd)], [option]])
        found[outcome(lambda words=words: parse_settings([*flags, *words]))] += 1
    assert_both(found)
