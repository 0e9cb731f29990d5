"""`xrl train --help`: short, with values; `--help-all`: every setting."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from xrl.config import Settings
from xrl.config.flags import FLAGS
from xrl.config.help import COMMON, MAX_COLUMNS, field_sentences, help_text
from xrl.config.parse import parse_settings

SECTIONS = list(typing.get_type_hints(Settings).values())


def shown(everything: bool) -> list[str]:
    """The flags that the help explains."""
    lines = help_text("xrl train", everything=everything).splitlines()
    return [line.split()[0].rstrip(",") for line in lines if line.startswith("  --")]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_setting_has_a_sentence(section: type) -> None:
    sentences = field_sentences(section)
    assert set(sentences) == {field.name for field in dataclasses.fields(section)}
    assert all(sentence.endswith(".") for sentence in sentences.values())


def test_short_help_shows_the_common_flags_and_where_the_others_are() -> None:
    common = [FLAGS[name].option for names in COMMON.values() for name in names]
    assert shown(everything=False) == ["--nproc-per-node", "--config", "--help-all", *common]
    assert len(common) < 30


def test_help_all_shows_every_flag_once() -> None:
    flags = shown(everything=True)
    assert len(flags) == len(set(flags))
    assert {flag.option for flag in FLAGS.values()} < set(flags)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("columns", ["60", "400"])
def test_help_fits_the_terminal_and_never_more_than_100_columns(
    monkeypatch: pytest.MonkeyPatch, everything: bool, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    limit = min(int(columns), MAX_COLUMNS)
    sentences = [line for line in help_text("xrl train", everything=everything).splitlines() if line[:6] == " " * 6]
    assert max(map(len, sentences)) <= limit


def test_values_and_defaults_are_shown() -> None:
    text = " ".join(help_text("xrl train", everything=True).split())
    assert "--engine {embedded,turbomind (lmdeploy)} or package.module:factory" in text
    assert "--judge {gsm8k,gsm8k-exact,math-verify} or path/file.py:function" in text
    assert "--kl-type {k1,k2,k3}" in text and "--rollout-dtype {auto,float32,bfloat16}" in text
    assert "--shuffle, --no-shuffle" in text and "(default: on)" in text
    assert "Largest global gradient norm; 0 turns clipping off. (default: 1)" in text


def test_a_default_is_told_once() -> None:
    for line in " ".join(help_text("xrl train", everything=True).split()).split(" --"):
        assert line.count("default:") <= 1, line


@pytest.mark.parametrize("flag", ["-h", "--help", "--help-all", "--help_all"])
def test_asking_for_help_prints_it_and_ends(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_settings(["--lr", flag])
    assert stop.value.code == 0
    everything = "all" in flag
    assert ("--canary-stop" in capsys.readouterr().out) == everything
