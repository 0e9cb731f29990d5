"""Flags and YAML files to Settings, and back.

A YAML file is a saved command line: each of its values becomes a flag placed before the typed ones. One parser reads
them all, the last value wins, and checks run once.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import tyro
import yaml

from xrl.config.elsewhere import translation
from xrl.config.errors import SettingsError, unreadable_files_refused
from xrl.config.files import read_whole
from xrl.config.flags import FLAGS
from xrl.config.help import help_text
from xrl.config.names import nearest
from xrl.config.settings import Settings

HELP_FLAGS = frozenset({"-h", "--help", "--help-all", "--help_all"})
# A saved command line is far smaller; the parser is slow.
MOST_YAML_BYTES = 2**16
# Looked at below a key that is unknown: files of other projects nest, but not further.
_MOST_NAMES, _DEEPEST_NAME = 1000, 10
# What `xrl train` takes beside settings.
_OTHER_FLAGS = ("config", "nproc_per_node", "help", "help_all")
_SECTIONS = {field.name for field in dataclasses.fields(Settings)}


@unreadable_files_refused()
def parse_settings(argv: Sequence[str] | None = None, *, prog: str = "xrl train") -> Settings:
    """The settings a command line and its `--config` files describe.

    Args:
        argv: default: the process's own.

    Raises:
        SettingsError: an unknown flag or key, a value of the wrong type, a missing or inconsistent setting.
    """
    typed = list(sys.argv[1:] if argv is None else argv)
    if asks_for_help(typed):
        print(help_text(prog, everything="--help-all" in typed or "--help_all" in typed))
        raise SystemExit(0)
    typed, files = _take_config_files(typed)
    arguments = [argument for file in files for argument in yaml_to_arguments(file)]
    arguments += _normalize(typed)
    given = {argument.partition("=")[0] for argument in arguments}
    for flag in FLAGS.values():
        if flag.is_required and flag.option not in given:
            raise SettingsError(f"{flag.option} is missing: it needs {flag.needed}, as a flag or in a --config file")
    # Everything tyro could complain of was checked above, in sentences of our own.
    return tyro.cli(Settings, prog=prog, args=arguments, config=(tyro.conf.OmitArgPrefixes,))


def load_settings(*arguments: str) -> Settings:
    """The settings that `xrl train` would have with these arguments.

        load_settings("--config", "configs/demo_single.yaml", "--num-rollouts", "40")

    Raises:
        SettingsError: as `parse_settings` does.
    """
    return parse_settings(arguments)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether a command line of `xrl train` wants its flags explained."""
    return not HELP_FLAGS.isdisjoint(arguments)


def yaml_to_arguments(file: Path) -> list[str]:
    """The flags that a YAML file stands for.

    Keys are flag names, with dashes or underscores, flat or grouped under the names of the sections. `null` leaves a
    setting at None. Relative paths start at the current directory, as those of typed flags do.

    Raises:
        SettingsError: the file is missing or not YAML, a key is unknown, a value has the wrong type.
    """
    try:
        text = read_whole(file, most_bytes=MOST_YAML_BYTES, what=f"--config {file}").decode("utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise SettingsError(f"{file}: not YAML that can be read: it is nested too deep") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise SettingsError(f"{file}{where}: not YAML: {problem}") from error
    arguments: list[str] = []
    lines: dict[str, int] = {}  # setting -> where it was set
    for section, key, value in _leaves(root, file) if root is not None else ():
        line = key.start_mark.line + 1
        flag = FLAGS.get(key.value.replace("-", "_"))
        if flag is None:
            _refuse_key(file, section, key, value)
        if not isinstance(value, yaml.ScalarNode):
            raise SettingsError(f"{file}, line {line}: {key.value} needs {flag.needed}, found a nested value")
        before = lines.setdefault(key.value.replace("-", "_"), line)
        if before != line:
            raise SettingsError(f"{file}, line {line}: {key.value} is set twice, on line {before} too")
        is_null = value.tag == "tag:yaml.org,2002:null"
        if is_null and not flag.is_optional:
            raise SettingsError(f"{file}, line {line}: {key.value} needs {flag.needed}, found null")
        text = "None" if is_null else value.value
        arguments += flag.arguments(text, where=f"{file}, line {line}: {key.value}")
    return arguments


def dump_settings(settings: Settings) -> str:
    """Every setting as YAML that `--config` takes again."""
    sections = {
        section: {name: _plain(value) for name, value in dataclasses.asdict(getattr(settings, section)).items()}
        for section in (field.name for field in dataclasses.fields(settings))
    }
    return yaml.safe_dump(sections, sort_keys=False)


def _leaves(root: yaml.Node, file: Path) -> Iterator[tuple[str, yaml.ScalarNode, yaml.Node]]:
    """(section or "", key, value) of each setting."""
    if not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"{file}, line 1: needs `key: value` lines, found something else")
    for key, value in _pairs(root, file):
        if isinstance(value, yaml.MappingNode) and key.value in _SECTIONS:
            yield from ((key.value, *pair) for pair in _pairs(value, file))
        elif key.value in _SECTIONS and key.value not in FLAGS:
            # An empty section: every line of it is a comment.
            if value.tag != "tag:yaml.org,2002:null":
                raise SettingsError(f"{file}, line {key.start_mark.line + 1}: section {key.value} needs settings in it")
        else:
            yield "", key, value


def _pairs(mapping: yaml.MappingNode, file: Path) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    for key, value in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            raise SettingsError(
                f"{file}, line {key.start_mark.line + 1}: needs the name of a setting, found a {key.id}"
            )
        yield key, value


def _refuse_key(file: Path, section: str, key: yaml.ScalarNode, value: yaml.Node) -> NoReturn:
    """Refuse an unknown key. Files of other projects nest: the first of their words at or below it is translated."""
    for name, mark in islice(_names_below(section, key, value), _MOST_NAMES):
        if _translated(name) is not None:
            _refuse_unknown(f"{file}, line {mark.line + 1}: key {name.removeprefix(f'{section}.')!r}", name)
    _refuse_unknown(f"{file}, line {key.start_mark.line + 1}: key {key.value!r}", key.value)


def _names_below(above: str, key: yaml.ScalarNode, value: yaml.Node) -> Iterator[tuple[str, yaml.Mark]]:
    """The dotted name of `key` and of each key nested in its value, with where it stands."""
    name = f"{above}.{key.value}" if above else key.value
    yield name, key.start_mark
    # Aliases can make a node a part of itself.
    if isinstance(value, yaml.MappingNode) and name.count(".") < _DEEPEST_NAME:
        for inner_key, inner_value in value.value:
            if isinstance(inner_key, yaml.ScalarNode):
                yield from _names_below(name, inner_key, inner_value)


def _take_config_files(typed: list[str]) -> tuple[list[str], list[Path]]:
    rest: list[str] = []
    files: list[Path] = []
    arguments = iter(typed)
    for argument in arguments:
        if argument == "--config":
            file = next(arguments, None)
            if file is None:
                raise SettingsError("--config needs a YAML file after it")
            files.append(Path(file))
        elif argument.startswith("--config="):
            files.append(Path(argument.removeprefix("--config=")))
        else:
            rest.append(argument)
    return rest, files


def _normalize(typed: list[str]) -> list[str]:
    """Check typed flags one by one, and write them the way tyro wants them."""
    arguments: list[str] = []
    index = 0
    while index < len(typed):
        option, equals, value = typed[index].partition("=")
        index += 1
        if not option.startswith("--"):
            _refuse_word(option)
        name = option.removeprefix("--").replace("-", "_")
        negated = FLAGS.get(name.removeprefix("no_")) if name.startswith("no_") else None
        if negated is not None and negated.is_switch and not equals:
            arguments += negated.arguments("False", where=option)
            continue
        flag = FLAGS.get(name)
        if flag is None:
            _refuse_unknown(f"flag {option}", name)
        if not equals:
            has_value = index < len(typed) and not typed[index].startswith("--")
            if flag.is_switch and not (has_value and typed[index].lower() in ("true", "false", "none", "null")):
                value = "True"
            elif has_value:
                value = typed[index]
                index += 1
            else:
                raise SettingsError(f"{flag.option} needs {flag.needed} after it")
        arguments += flag.arguments(value, where=flag.option)
    return arguments


def _refuse_unknown(what: str, name: str) -> NoReturn:
    """Refuse a name that is no setting, with what was meant where that can be told."""
    name = name.replace("-", "_")
    answer = _translated(name)
    if answer is None:
        near = nearest(name, [*FLAGS, *_OTHER_FLAGS])
        answer = f"the nearest is {_as_option(near)}" if near else "--help-all lists all"
    raise SettingsError(f"{what} is unknown; {answer}")


def _refuse_word(word: str) -> NoReturn:
    """Refuse an argument without two dashes that no flag takes as its value."""
    what = f"argument {word!r} is not a flag"
    if Path(word).suffix.lower() in (".yaml", ".yml", ".json"):
        raise SettingsError(f"{what}: put --config before it")
    name = word.lstrip("-+~").replace("-", "_")
    if name in FLAGS or name in _OTHER_FLAGS:
        raise SettingsError(f"{what}: the flag is {_as_option(name)}")
    answer = _translated(name)
    if answer is not None:
        raise SettingsError(f"{what}; {answer}")
    raise SettingsError(f"{what}, and no flag before it takes it as a value")


def _translated(name: str) -> str | None:
    """What another project's word is here: from the table, or a setting of ours below names that we do not nest."""
    answer = translation(name)
    last = name.rpartition(".")[2].replace("-", "_")
    if answer is None and "." in name and last in FLAGS:
        return f"here it is {_as_option(last)}"
    return answer


def _as_option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
