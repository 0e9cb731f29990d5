"""What may differ between the run that saved and the one that goes on, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.small_runs import run_flags, write_rows
from tests.tiny_models import make_checkpoint
from xrl.checkpoint import changes
from xrl.checkpoint.changes import differences, flat_settings, identity, refuse_another_run
from xrl.checkpoint.manifest import Unusable
from xrl.config.flags import FLAGS
from xrl.config.parse import parse_settings
from xrl.models.shape import read_model_shape


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("run")
    data = write_rows(folder / "train.jsonl", [{"prompt": "1+1=?", "ground_truth": "2"}] * 4)
    return run_flags(make_checkpoint(folder / "model"), data, folder)


def found_identity(flags: list[str], *more: str) -> dict:
    settings = parse_settings([*flags, *more])
    return identity(settings, read_model_shape(settings.model.model))


def test_identity_and_settings_come_back_from_json(flags: list[str]) -> None:
    for said in (found_identity(flags), flat_settings(parse_settings(flags))):
        assert json.loads(json.dumps(said)) == said
    assert set(flat_settings(parse_settings(flags))) == set(FLAGS)


def test_the_same_run_goes_on_wherever_its_files_are(flags: list[str], tmp_path: Path) -> None:
    data = Path(flags[flags.index("--data") + 1])
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(data.read_bytes())
    refuse_another_run(found_identity(flags), found_identity(flags, "--data", str(copy)), Path("step-3"))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--seed", "7"), "it was saved with --seed 1234, now it is 7"),
        (("--no-shuffle",), "it was saved with --shuffle True, now it is False"),
        (("--max-prompt-length", "31"), "it was saved with --max-prompt-length 32, now it is 31"),
    ],
)
def test_another_order_of_prompts_is_refused(flags: list[str], more: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(Unusable, match=f"step-3 cannot be gone on from: {sentence}; use what it was saved with"):
        refuse_another_run(found_identity(flags), found_identity(flags, *more), Path("step-3"))


def test_other_data_another_tokenizer_and_another_model_are_refused(flags: list[str], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "other.jsonl", [{"prompt": "1+2=?", "ground_truth": "3"}] * 4)
    with pytest.raises(Unusable, match="--data has other content"):
        refuse_another_run(found_identity(flags), found_identity(flags, "--data", str(data)), Path("step-3"))
    model = make_checkpoint(tmp_path / "model", num_hidden_layers=3)
    with pytest.raises(Unusable, match="its model has num_layers 4, --model has 3"):
        refuse_another_run(found_identity(flags), found_identity(flags, "--model", str(model)), Path("step-3"))
    now = found_identity(flags)
    for name in ("tokenizer.json", "chat_template.jinja"):
        before = {**now["tokenizer"], name: "0"}
        with pytest.raises(Unusable, match=rf"the tokenizer of --model has other content .* \({name}\)"):
            refuse_another_run({**now, "tokenizer": before}, now, Path("step-3"))
    with pytest.raises(Unusable, match="--model has other content"):
        refuse_another_run({**now, "reference": {"model.safetensors": "0"}}, {**now, "reference": {}}, Path("step-3"))


def test_a_tokenizer_may_be_of_other_files(flags: list[str], tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    (model / "tokenizer.json").rename(model / "vocab.json")
    assert "tokenizer.json" not in found_identity(flags, "--model", str(model))["tokenizer"]
    assert "vocab.json" in found_identity(flags, "--model", str(model))["tokenizer"]


def test_changes_are_told_and_whether_the_bits_depend_on_them(flags: list[str]) -> None:
    before = flat_settings(parse_settings(flags))
    now = flat_settings(parse_settings([*flags, "--lr", "2e-6", "--rollout-num-workers", "2", "--run-dir", "x"]))
    told = dict(differences(before, now, {"threads_of_a_rank": 1}, {"threads_of_a_rank": 2}))
    assert told == {
        "--lr is 2e-06, was 1e-06": True,
        "--rollout-num-workers is 2, was None": False,
        "threads of a rank: 2, was 1": True,
    }


def test_a_longer_run_is_the_same_run_where_its_learning_rate_does_not_depend_on_its_length(flags: list[str]) -> None:
    for style, counts in (("constant", False), ("cosine", True)):
        before, now = (
            flat_settings(parse_settings([*flags, "--num-rollouts", count, "--lr-decay-style", style]))
            for count in ("3", "5")
        )
        assert list(differences(before, now, {}, {})) == [("--num-rollouts is 5, was 3", counts)]


def test_settings_without_effect_are_settings() -> None:
    assert changes._WITHOUT_EFFECT - {"exit_before"} <= set(FLAGS)


def test_every_dimension_of_a_model_is_compared(flags: list[str]) -> None:
    said = found_identity(flags)["model"]
    assert set(said) == {field.name for field in dataclasses.fields(read_model_shape(Path(flags[1])))}
