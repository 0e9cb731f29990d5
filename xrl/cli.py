"""The `xrl` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import xrl
from xrl.config import SettingsError
from xrl.config.parse import parse_settings
from xrl.launch.children import module_command
from xrl.launch.exit import EXIT_BAD_SETTINGS, run_main
from xrl.launch.memory import restart_with_large_pages
from xrl.launch.start import prepare_process
from xrl.launch.terminal import say
from xrl.launch.threads import set_thread_waiting
from xrl.launch.variables import drop_rank_variables

USAGE = """usage: xrl COMMAND [ARGUMENTS]

  train    train a model with GRPO            xrl train --nproc-per-node 4 --config FILE.yaml [FLAGS]
  gsm8k    convert GSM8K to training rows     xrl gsm8k --input-dir DIR --out-dir DIR [--overwrite]
  convert  Hugging Face <-> Megatron          xrl convert --from DIR --to DIR [--check] [LAYOUT FLAGS]
  worker   host one rollout engine            xrl worker --model DIR --max-model-len N
  version  print the version

`xrl COMMAND --help` tells more."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; bad input is one sentence on stderr and exit code 2."""
    if argv is None:
        prepare_process()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return
    if command not in COMMANDS:
        say(f"error: unknown command {command!r}, known are: {', '.join(COMMANDS)}")
        sys.exit(EXIT_BAD_SETTINGS)
    if command == "train" and argv is None and not {"-h", "--help"} & set(arguments):
        restart_with_large_pages()
    try:
        COMMANDS[command](arguments)
    except SettingsError as error:
        say(f"error: {error}")
        sys.exit(EXIT_BAD_SETTINGS)
    except KeyboardInterrupt:
        say("stopped by SIGINT")
        sys.exit(128 + signal.SIGINT)


class _Parser(argparse.ArgumentParser):
    """One sentence for bad input, like everywhere else."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (`{self.prog} --help` tells more)")


def train(arguments: list[str]) -> None:
    """Check everything here, once, then start the ranks."""
    from xrl.preflight import preflight

    num_ranks, arguments = _take_number(arguments, "--nproc-per-node")
    if {"-h", "--help"} & set(arguments):
        print("--nproc-per-node N starts N ranks on this machine; left out: 1.")
    settings = parse_settings(arguments)
    drop_rank_variables(os.environ)  # of a launcher above us: this is a world of its own
    preflight(settings, world_size=num_ranks)
    if num_ranks == 1:
        # A world of one needs no torchrun; training in this process shows its errors by itself.
        set_thread_waiting(os.environ)
        from xrl.train import train as train_here

        run_main(lambda: train_here(settings))
    from xrl.agent import run_ranks

    sys.exit(run_ranks(arguments, num_ranks=num_ranks))


def gsm8k(arguments: list[str]) -> None:
    """Convert GSM8K."""
    from xrl.data.gsm8k import convert

    parser = _Parser(prog="xrl gsm8k", description="Convert GSM8K to rows that `xrl train` reads.")
    parser.add_argument(
        "--input-dir", type=Path, required=True, help="the hub's layout (parquet) or train.jsonl/test.jsonl"
    )
    parser.add_argument("--out-dir", type=Path, default=Path("gsm8k"), help="where train.jsonl and test.jsonl go")
    parser.add_argument("--overwrite", action="store_true", help="replace files that hold something else")
    parsed = parser.parse_args(arguments)
    for split, num_rows in convert(parsed.input_dir, parsed.out_dir, overwrite=parsed.overwrite).items():
        print(f"{parsed.out_dir / split}.jsonl: {num_rows:,} rows")


def convert(arguments: list[str]) -> None:
    """Convert a checkpoint, or compare two."""
    from xrl.convert import run

    parser = _Parser(
        prog="xrl convert",
        description="Hugging Face folders to Megatron checkpoints at any layout, and back: the format of --from tells "
        "which, and a Megatron checkpoint with layout flags is laid out anew. --check converts in memory, there and "
        "back, or compares --from with --to; it reports every tensor that differs, with exit code 1.",
    )
    parser.add_argument("--from", dest="source", type=Path, required=True, help="Hugging Face or Megatron folder")
    parser.add_argument("--to", dest="target", type=Path, help="folder to write; must not exist (with --check: must)")
    parser.add_argument("--check", action="store_true", help="compare bit by bit, write nothing")
    for flag, help_ in (
        ("--tensor-model-parallel-size", "ranks that share each layer's matrices"),
        ("--pipeline-model-parallel-size", "ranks that each hold a run of consecutive layers"),
        ("--virtual-pipeline-model-parallel-size", "runs of layers on each of those"),
        ("--expert-model-parallel-size", "ranks that share the experts"),
        ("--decoder-first-pipeline-num-layers", "layers of the first stage, where stages are uneven"),
        ("--decoder-last-pipeline-num-layers", "layers of the last stage"),
    ):
        parser.add_argument(flag, type=int, help=help_)
    parser.add_argument(
        "--transformer-impl",
        choices=("local", "transformer_engine"),
        help="whose parameter names a Megatron checkpoint has (default: local)",
    )
    sys.exit(run(parser.parse_args(arguments)))


def worker(arguments: list[str]) -> None:
    """Host one rollout engine."""
    drop_rank_variables(os.environ)
    os.execv(sys.executable, [*module_command("xrl.rollout.worker"), *arguments])


def version(arguments: list[str]) -> None:
    """Print the version."""
    print(xrl.__version__)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "gsm8k": gsm8k,
    "convert": convert,
    "worker": worker,
    "version": version,
}


def _take_number(arguments: list[str], flag: str) -> tuple[int, list[str]]:
    """The value of one of our own flags, and the arguments without it."""
    spellings = {flag, "--" + flag.removeprefix("--").replace("-", "_")}  # torchrun takes both
    rest: list[str] = []
    text = "1"
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, value = argument.partition("=")
        if option in spellings:
            text = value if equals else next(remaining, "")
        else:
            rest.append(argument)
    if not text.isdigit() or int(text) < 1:
        raise SettingsError(f"{flag} needs a whole number >= 1, found {text!r}")
    return int(text), rest


if __name__ == "__main__":
    main()
