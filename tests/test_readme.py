"""Every command that README shows is one that xrl takes, with files that a clone has or that a line before it made."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from xrl.config import SettingsError
from xrl.config.flags import FLAGS
from xrl.config.parse import parse_settings
from xrl.config.sentence_parser import SentenceParser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# Made by the lines that README shows, or by the reader.
MADE = ("models/", "gsm8k", "data/gsm8k", "work_dir/", "lmdeploy-env/", "RUN/")


def shell_lines() -> Iterator[str]:
    """The lines of README's sh blocks, continued ones joined, without comments."""
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield shlex.join(words)


def lines_of(*first: str) -> list[list[str]]:
    """The words after `first`, of each line that begins with it."""
    lines = [shlex.split(line) for line in shell_lines()]
    return [words[len(first) :] for words in lines if tuple(words[: len(first)]) == first]


def is_there(path: str) -> bool:
    return path.startswith(MADE) or (ROOT / path.partition(":")[0]).exists()


def check_settings(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of a `xrl train`, as settings; its files are there."""
    monkeypatch.chdir(ROOT)
    if "--rollout-python" in words:  # the only path that is looked for while the words are read
        place = words.index("--rollout-python")
        del words[place : place + 2]
    settings = parse_settings(words)
    assert is_there(str(settings.model.model)) and is_there(str(settings.data.data))
    assert ":" not in settings.rewards.judge or is_there(settings.rewards.judge)


def test_the_first_command_after_the_demo_puts_xrl_on_the_path() -> None:
    lines = list(shell_lines())
    assert lines.index("source .venv/bin/activate") < min(
        number for number, line in enumerate(lines) if line.startswith("xrl ")
    )


@pytest.mark.parametrize("words", lines_of("xrl", "train"), ids=shlex.join)
def test_training_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if "--nproc-per-node" in words:
        place = words.index("--nproc-per-node")
        assert words[place + 1].isdigit()
        del words[place : place + 2]
    check_settings(words, monkeypatch)


@pytest.mark.parametrize("words", lines_of("torchrun"), ids=shlex.join)
def test_torchrun_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[:4] == ["--nproc-per-node", words[1], "-m", "xrl.train"] and words[1].isdigit()
    check_settings(words[4:], monkeypatch)


@pytest.mark.parametrize("words", lines_of("examples/run_rl.sh"), ids=shlex.join)
def test_script_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config, engine, model, data, dashes, *flags = words
    assert dashes == "--"
    check_settings(["--config", config, "--engine", engine, "--model", model, "--data", data, *flags], monkeypatch)


@pytest.mark.parametrize(
    ("command", "words"),
    [(command, words) for command in ("gsm8k", "convert", "worker") for words in lines_of("xrl", command)],
    ids=lambda value: shlex.join(value) if isinstance(value, list) else value,
)
def test_other_commands_parse(command: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import xrl.cli

    class Parsed(Exception):
        pass

    def parse_only(parser: SentenceParser, arguments: list[str]) -> None:
        super(SentenceParser, parser).parse_args(arguments)
        raise Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(SentenceParser, "parse_args", parse_only)
    with pytest.raises(Parsed):
        xrl.cli.COMMANDS[command](words)
    for flag, value in zip(words, words[1:], strict=False):
        if flag in ("--from", "--model", "--input-dir"):
            assert is_there(value), value


def test_make_targets_are_there() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    variables = re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target, *assignments in lines_of("make"):
        assert target in targets
        assert all(assignment.partition("=")[0] in variables for assignment in assignments)


def test_flags_that_the_text_names_are_there() -> None:
    others = {"--config", "--nproc-per-node", "--help", "--help-all", "--check"}
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for option in re.findall(r"`(--[a-z][a-z0-9-]*)", prose):
        assert option in others or option.removeprefix("--").replace("-", "_") in FLAGS, option


def test_a_flag_that_there_is_not_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError):
        check_settings(["--config", "configs/demo_single.yaml", "--no-such-flag", "1"], monkeypatch)
    with pytest.raises(AssertionError):
        check_settings(["--config", "configs/demo_single.yaml", "--model", "examples/nobody"], monkeypatch)
