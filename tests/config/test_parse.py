"""Flags and YAML files become one checked Settings; every mistake is a sentence that says where it is."""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xrl.config import Settings, SettingsError
from xrl.config.flags import FLAGS
from xrl.config.parse import dump_settings, parse_settings

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ["--model", "m", "--data", "d.jsonl"]


def parse(*flags: str) -> Settings:
    return parse_settings([*NEEDED, *flags])


def refusal(*flags: str) -> str:
    with pytest.raises(SettingsError) as caught:
        parse(*flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def config(tmp_path: Path) -> typing.Callable[[str], str]:
    def write(text: str) -> str:
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return str(file)

    return write


Write = typing.Callable[[str], str]


def test_flags_set_what_they_name() -> None:
    settings = parse("--tensor-model-parallel-size", "2", "--sequence-parallel", "--lr=1e-6", "--judge", "math-verify")
    assert settings.model.model == Path("m")
    assert settings.parallel.tensor_model_parallel_size == 2
    assert settings.parallel.sequence_parallel is True
    assert settings.optimizer.lr == 1e-6
    assert settings.rewards.judge == "math-verify"
    assert settings.run == type(settings.run)()


def test_switches_take_no_or_a_value() -> None:
    assert parse("--no-shuffle").data.shuffle is False
    assert parse("--shuffle", "false").data.shuffle is False
    assert parse("--shuffle=true").data.shuffle is True
    assert parse("--bf16").model.bf16 is True
    assert parse("--bf16", "false").model.bf16 is False
    assert parse("--no-bf16").model.bf16 is False
    assert parse("--bf16", "null").model.bf16 is None
    assert parse("--bf16", "none").model.bf16 is None


def test_underscores_are_as_good_as_dashes() -> None:
    assert parse("--max_prompt_length", "7").data.max_prompt_length == 7


def test_a_negative_number_is_a_value_and_not_a_flag() -> None:
    assert "--kl-coef must be >= 0, got -1" in refusal("--kl-coef", "-1")


@pytest.mark.parametrize(
    "text",
    [
        "model: m\ndata: d.jsonl\nlr: 1e-6\nmax_prompt_length: 7\nbf16: null\nshuffle: false\n",
        "model:\n  model: m\n  bf16: null\ndata:\n  data: d.jsonl\n  max-prompt-length: 7\n  shuffle: false\n"
        "optimizer:\n  lr: 1e-6\nrollout:\n",
    ],
    ids=["flat", "grouped"],
)
def test_yaml_sets_what_it_names(config: Write, text: str) -> None:
    settings = parse_settings(["--config", config(text)])
    assert settings == parse("--lr", "0.000001", "--max-prompt-length", "7", "--no-shuffle")


def test_number_that_yaml_takes_for_text_is_a_number(config: Write) -> None:
    assert parse("--config", config("lr: 1e-6")).optimizer.lr == 1e-6


def test_null_leaves_an_optional_setting_out(config: Write, tmp_path: Path) -> None:
    file = config("run:\n  save_interval: null\n")
    other = tmp_path / "first.yaml"
    other.write_text("save_interval: 5")
    assert parse("--config", str(other)).run.save_interval == 5
    assert parse("--config", str(other), "--config", file).run.save_interval is None


def test_the_last_value_wins_and_flags_win_over_files(config: Write, tmp_path: Path) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("seed: 3\nlr: 0.5\n")
    files = ["--config", config("seed: 2\nlr: 0.25\nmin_lr: 0.125\n"), f"--config={later}"]
    settings = parse("--seed", "4", *files, "--seed", "5")
    assert (settings.run.seed, settings.optimizer.lr, settings.optimizer.min_lr) == (5, 0.5, 0.125)


def test_unknown_flag_gets_the_nearest_name() -> None:
    sentence = refusal("--tensor-model-paralel-size", "2")
    assert "--tensor-model-paralel-size is unknown" in sentence
    assert sentence.endswith("the nearest is --tensor-model-parallel-size")


def test_unknown_flag_like_no_other_points_to_the_help() -> None:
    assert refusal("--zzzzzz").endswith("--help-all lists all")


def test_unknown_key_gets_its_line_and_the_nearest_name(config: Write) -> None:
    file = config("optimizer:\n  # a comment\n  learning_rate: 1\n  lr_decay_stile: linear\n")
    assert f"{file}, line 3: key 'learning_rate' is unknown" in refusal("--config", file)
    file = config("optimizer:\n  # a comment\n  lr_decay_stile: linear\n")
    sentence = refusal("--config", file)
    assert f"{file}, line 3" in sentence and sentence.endswith("the nearest is --lr-decay-style")


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("data:\n  rollout_batch_size: many\n", "a whole number"),
        ("data:\n  rollout_batch_size: 1.5\n", "a whole number"),
        ("data:\n  rollout_batch_size: null\n", "a whole number"),
        ("data:\n  rollout_batch_size: [1, 2]\n", "a whole number"),
        ("data:\n  rollout_batch_size:\n    size: 4\n", "a whole number"),
        ("optimizer:\n  lr: fast\n", "a number"),
        ("data:\n  shuffle: maybe\n", "true or false"),
        ("algorithm:\n  kl_type: k4\n", "one of k1, k2, k3"),
        ("run:\n  save_interval: often\n", "a whole number (or null)"),
    ],
)
def test_value_of_the_wrong_type_gets_its_line(config: Write, text: str, needed: str) -> None:
    file = config(text)
    sentence = refusal("--config", file)
    assert f"{file}, line 2" in sentence and f"needs {needed}" in sentence


def test_typed_value_of_the_wrong_type_is_refused() -> None:
    assert refusal("--seed", "one") == "--seed needs a whole number, found 'one'"
    assert refusal("--seed") == "--seed needs a whole number after it"


@pytest.mark.parametrize(
    "text", ["lr: 1\nseed: 2\nlr: 3\n", "lr: 1\noptimizer:\n  lr: 3\n", "num-rollouts: 1\nseed: 2\nnum_rollouts: 1\n"]
)
def test_setting_that_a_file_has_twice_is_refused(config: Write, text: str) -> None:
    assert "line 3: " in (said := refusal("--config", config(text))) and "is set twice, on line 1 too" in said


def test_file_that_is_nested_too_deep_is_refused(config: Write) -> None:
    assert "nested too deep" in refusal("--config", config("lr: " + "[" * 5000))


def test_file_that_is_not_yaml_gets_its_line(config: Write) -> None:
    file = config("seed: 1\nlr: [1\n")
    sentence = refusal("--config", file)
    assert sentence.startswith(f"{file}, line ") and "not YAML" in sentence


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert f"{file}: not YAML" in refusal("--config", str(file))
    file.write_bytes(b"seed: \x00\n")
    assert f"{file}: not YAML" in refusal("--config", str(file))


def test_key_that_is_a_list_is_refused(config: Write) -> None:
    file = config("seed: 1\n? [a, b]\n: 2\n")
    assert refusal("--config", file) == f"{file}, line 2: needs the name of a setting, found a sequence"


def test_number_must_be_finite() -> None:
    assert refusal("--lr", "nan") == "--lr needs a number, found 'nan'"
    assert refusal("--lr=inf") == "--lr needs a number, found 'inf'"


def test_file_that_is_a_list_is_refused(config: Write) -> None:
    assert "needs `key: value` lines" in refusal("--config", config("- seed\n"))


def test_section_with_a_value_is_refused(config: Write) -> None:
    assert "section optimizer needs settings in it" in refusal("--config", config("optimizer: adam\n"))


def test_missing_file_is_refused() -> None:
    assert refusal("--config", "nowhere.yaml").startswith("--config nowhere.yaml cannot be read")
    assert refusal("--config") == "--config needs a YAML file after it"


def test_empty_file_changes_nothing(config: Write) -> None:
    assert parse("--config", config("# nothing yet\n")) == parse()


@pytest.mark.parametrize("text", ["²", "٣", "１２", "1_000", "+5", " 5", "5 ", "0x10", "1e3", "5.0"])
def test_whole_numbers_are_ascii_digits(config: Write, text: str) -> None:
    assert refusal("--num-rollouts", text) == f"--num-rollouts needs a whole number (or null), found {text!r}"
    file = config(f"num_rollouts: '{text}'\n")
    assert refusal("--config", file) == f"{file}, line 1: num_rollouts needs a whole number (or null), found {text!r}"


@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.type is int])
@pytest.mark.parametrize("number", [str(2**31), str(2**63), str(10**30), "9" * 5000], ids=len)
def test_counts_beyond_any_machine_are_refused(name: str, number: str) -> None:
    if name == "seed" and len(number) < 19:
        return
    said = refusal(f"--{name.replace('_', '-')}", number)
    assert f"--{name.replace('_', '-')}" in said and len(said) < 300


@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.type is float])
@pytest.mark.parametrize("text", ["1e999", "٣.٥", "²", "1_0.5", " 1", "nan", "1" * 5000, "1e308", "-1e308", "1e-320"])
def test_numbers_are_taken_or_refused_in_a_sentence(name: str, text: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    try:
        found = parse(f"{flag}={text}")
    except SettingsError as error:
        assert flag in str(error) and len(str(error)) < 400
    else:
        assert text in ("1e308", "-1e308", "1e-320")
        dump_settings(found)


@pytest.mark.parametrize("value", ['"a\\0b"', '"\\uD800"'])
@pytest.mark.parametrize("name", ["data", "work_dir", "judge"])
def test_names_that_no_file_can_have_are_refused(config: Write, name: str, value: str) -> None:
    file = config(f"{name}: {value}\n")
    assert f"{file}, line 1: {name} needs " in refusal("--config", file)


@pytest.mark.parametrize(
    "text",
    [
        "x: &a {b: *a}\n",
        "x: &a [*a]\n",
        "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{k: *a{n - 1}, l: *a{n - 1}}}\n" for n in range(1, 60)),
    ],
    ids=["in itself", "list in itself", "twice as many each time"],
)
def test_aliases_of_an_unknown_key_lead_nowhere(config: Write, text: str) -> None:
    assert "line 1: key " in refusal("--config", config(text))


def test_what_a_file_quotes_is_no_line_of_its_own(config: Write) -> None:
    said = refusal("--config", config('"\\e[2J\\nxrl: error: fake": 1\n'))
    assert "\\x1b[2J" in said and said.isprintable()


def test_a_file_of_settings_is_a_file_and_not_large(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal("--config", str(tmp_path / "pipe")) == f"--config {tmp_path}/pipe is a pipe: a file is needed"
    (tmp_path / "large.yaml").write_bytes(b"#" * (2**16 + 1))
    assert "is larger than the 65,536 bytes" in refusal("--config", str(tmp_path / "large.yaml"))


def test_an_interpreter_whose_name_is_too_long_is_refused() -> None:
    assert "cannot be read: File name too long" in refusal("--rollout-python", "y" * 300)


def test_missing_setting_is_named() -> None:
    with pytest.raises(SettingsError, match="--data is missing"):
        parse_settings(["--model", "m"])


def test_word_without_a_flag_is_refused() -> None:
    assert "'train' is not a flag" in refusal("train")


@pytest.mark.parametrize("file", ["run.yaml", "folder/run.yml", "run.YAML"])
def test_file_without_config_before_it_is_told_where_it_goes(file: str) -> None:
    assert refusal("--shuffle", file) == f"argument {file!r} is not a flag: put --config before it"


@pytest.mark.parametrize("word", ["lr=1e-6", "-lr", "+lr=3"])
def test_setting_without_two_dashes_is_told_its_flag(word: str) -> None:
    assert refusal(word).endswith("is not a flag: the flag is --lr")


def test_misspelt_config_gets_the_nearest_name() -> None:
    assert refusal("--confg", "run.yaml").endswith("the nearest is --config")


def test_other_name_of_an_engine_becomes_its_own(config: Write) -> None:
    assert parse("--engine", "lmdeploy").rollout.engine == "turbomind"
    assert parse("--config", config("engine: lmdeploy\n")).rollout.engine == "turbomind"


VALUES: dict[str, st.SearchStrategy[object]] = {
    "model": st.text(alphabet="abc/-._ ü:#'\"", min_size=1).map(Path),
    "lr": st.floats(min_value=1e-12, max_value=1.0),
    "seed": st.integers(min_value=-(2**62), max_value=2**62),
    "num_rollouts": st.none() | st.integers(min_value=1, max_value=10**9),
    "bf16": st.none() | st.booleans(),
    "shuffle": st.booleans(),
    "dual_clip": st.none() | st.floats(min_value=1.5, max_value=1e6),
    "kl_type": st.sampled_from(["k1", "k2", "k3"]),
    "judge": st.text(alphabet="abc/-._:ü #'\"", min_size=1),
    "recompute_granularity": st.sampled_from([None, "full", "selective"]),
}


def with_values(settings: Settings, values: dict[str, object]) -> Settings:
    for section in dataclasses.fields(settings):
        part = getattr(settings, section.name)
        own = {field.name: values[field.name] for field in dataclasses.fields(part) if field.name in values}
        settings = dataclasses.replace(settings, **{section.name: dataclasses.replace(part, **own)})
    return settings


@settings(deadline=None, max_examples=25)
@example({"judge": "--lr", "model": Path("-m")})
@example({"judge": "a=b", "model": Path("null")})
@given(st.fixed_dictionaries(VALUES))
def test_dumped_settings_parse_to_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]
) -> None:
    settings = with_values(parse("--min-lr", "0"), values)
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump_settings(settings))
    assert parse_settings(["--config", str(file)]) == settings


def test_a_dump_names_every_setting() -> None:
    dumped = yaml.safe_load(dump_settings(parse()))
    assert {name for section in dumped.values() for name in section} == set(FLAGS)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_example_config_parses(file: Path) -> None:
    settings = parse_settings(["--config", str(file)])
    assert settings.data.rollout_batch_size > 0


def test_null_is_refused_where_a_value_is_needed(config: Write) -> None:
    with pytest.raises(SettingsError, match="line 1: data needs a path, found null"):
        parse_settings(["--config", str(config("data: null\n"))])


@pytest.mark.parametrize("seed", [2**63, -(2**63)])
def test_seed_must_leave_room_for_those_made_from_it(seed: int) -> None:
    with pytest.raises(SettingsError, match="--seed must be between"):
        parse_settings([*NEEDED, "--seed", str(seed)])
