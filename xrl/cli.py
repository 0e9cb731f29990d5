"""The `xrl` command."""

from __future__ import annotations

import sys

if __name__ == "__main__" and sys.argv[1:2] == ["train"]:  # kept until somebody hears them: importing takes a while
    from xrl.launch.hearing import block_signals

    block_signals()

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import xrl
from xrl.config import SettingsError
from xrl.config.names import nearest
from xrl.config.numbers import whole_number
from xrl.config.parse import asks_for_help, parse_settings
from xrl.config.printable import one_line, shown
from xrl.config.sentence_parser import SentenceParser
from xrl.launch.children import module_command
from xrl.launch.exit import EXIT_BAD_SETTINGS, run_main
from xrl.launch.hearing import RUN_SIGNALS, block_signals, hearing
from xrl.launch.memory import restart_with_large_pages
from xrl.launch.signals import Stopped, raise_on_signals
from xrl.launch.start import prepare_process, without_collections
from xrl.launch.stop import RunSignals, StopRequest
from xrl.launch.terminal import say
from xrl.launch.threads import set_thread_waiting
from xrl.launch.variables import drop_rank_variables

USAGE = """usage: xrl COMMAND [ARGUMENTS]

  train    train a model with GRPO            xrl train --nproc-per-node 4 --config FILE.yaml [FLAGS]
  gsm8k    convert GSM8K to training rows     xrl gsm8k --input-dir DIR --out-dir DIR [--overwrite]
  convert  Hugging Face <-> Megatron          xrl convert --from DIR --to DIR [--check] [LAYOUT FLAGS]
  worker   host one rollout engine            xrl worker --model DIR --max-model-len N
  replay   train a recorded step again        xrl replay RUN_DIR --step N
  doctor   say what a run's ranks are at      xrl doctor RUN_DIR
  version  print the version                  xrl --version
  help     explain a command                  xrl help train

`xrl COMMAND --help` tells more."""
# What people write for a command.
SPELLINGS = {"-h": "help", "--help": "help", "-V": "version", "--version": "version"}
# Those that remove what they have half written when they are stopped.
WRITERS = ("convert", "gsm8k")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; bad input is one sentence on stderr and exit code 2."""
    if argv is None:
        prepare_process()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else "help"
    command = SPELLINGS.get(command, command)
    if command == "train" and argv is None and not asks_for_help(arguments):
        block_signals()
        restart_with_large_pages()
    if command in WRITERS and argv is None:
        raise_on_signals()
    try:
        _check_command(command)
        COMMANDS[command](arguments)
    except SettingsError as error:
        say(f"error: {error}")
        sys.exit(EXIT_BAD_SETTINGS)
    except Stopped as stopped:
        say(f"stopped by {stopped.signal.name}")
        raise
    except KeyboardInterrupt:
        say("stopped by SIGINT")
        sys.exit(128 + signal.SIGINT)


def train(arguments: list[str]) -> None:
    """Check everything here, once, then start the ranks."""
    stop = StopRequest()
    with hearing(RUN_SIGNALS, lambda heard: RunSignals(stop, heard.end, say=say).hear) as heard:
        from xrl.preflight import preflight

        num_ranks, arguments = _take_number(arguments, "--nproc-per-node")
        settings = parse_settings(arguments)
        drop_rank_variables(os.environ)  # of a launcher above us: this is a world of its own
        preflight(settings, world_size=num_ranks)
        if num_ranks == 1:
            # A world of one needs no torchrun; training in this process shows its errors by itself.
            set_thread_waiting(os.environ)
            from xrl.train import train as train_here

            run_main(lambda: train_here(settings, stop), heard)
        from xrl.launch.torchrun import run_ranks
        from xrl.metrics.ending import note_end_of_ranks, words_of_ranks

        sys.exit(
            run_ranks(
                arguments,
                num_ranks=num_ranks,
                words_of_ranks=words_of_ranks,
                note_end_of_ranks=note_end_of_ranks,
                heard=heard,
            )
        )


def gsm8k(arguments: list[str]) -> None:
    """Convert GSM8K."""
    from xrl.data.gsm8k import convert

    parser = SentenceParser(prog="xrl gsm8k", description="Convert GSM8K to rows that `xrl train` reads.")
    parser.add_argument(
        "--input-dir",
        type=Path,
        required=True,
        help="folder with the hub's parquet files (main/train-*.parquet), or the original train.jsonl and test.jsonl",
    )
    parser.add_argument(
        "--out-dir",
        type=Path,
        default=Path("gsm8k"),
        help="where the rows go: train.jsonl and test.jsonl (default: gsm8k)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that hold something else")
    parsed = parser.parse_args(arguments)
    for split, num_rows in convert(parsed.input_dir, parsed.out_dir, overwrite=parsed.overwrite).items():
        print(one_line(f"{parsed.out_dir / split}.jsonl: {num_rows:,} rows"))


def convert(arguments: list[str]) -> None:
    """Convert a checkpoint, or compare two."""
    with without_collections():
        from xrl.convert import run

    parser = SentenceParser(
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
    from xrl.rollout.access import KEY_VARIABLE, shared_key
    from xrl.rollout.worker_flags import parse_worker_flags

    # What is wrong, and --help, is told before torch is imported.
    flags = parse_worker_flags(arguments)
    if KEY_VARIABLE not in os.environ or flags.key_file is not None:
        shared_key(flags.key_file, flag="--key-file")
    drop_rank_variables(os.environ)
    os.execv(sys.executable, [*module_command("xrl.rollout.worker"), *arguments])


def doctor(arguments: list[str]) -> None:
    """Say what the ranks of a run are at, or were when it hung."""
    from xrl.doctor import examine

    parser = SentenceParser(
        prog="xrl doctor",
        description="What each rank of a run is at: its phase, the line of code of its main thread, whom it waits for, "
        "and the collective that it is in. Of a run that goes on, its ranks are asked; of one that ended because it "
        "hung, what rank 0 wrote down is shown.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of the run, work_dir/20261129153000 say")
    for line in examine(parser.parse_args(arguments).run_dir):
        print(one_line(line))


def replay(arguments: list[str]) -> None:
    """Train a recorded step again, and compare."""
    from xrl.replay import main as replay_here

    drop_rank_variables(os.environ)
    replay_here(arguments)


def version(arguments: list[str]) -> None:
    """Print the version."""
    print(xrl.__version__)


def help_(arguments: list[str]) -> None:
    """Explain a command, or list them all."""
    command = next(iter(arguments), "help")
    _check_command(command)
    if command in ("help", "version"):
        print(USAGE)
    else:
        COMMANDS[command](["--help", *arguments[1:]])


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "gsm8k": gsm8k,
    "convert": convert,
    "worker": worker,
    "replay": replay,
    "doctor": doctor,
    "version": version,
    "help": help_,
}


def _check_command(command: str) -> None:
    """Refuse a command that there is none of, with the one that was probably meant."""
    if command in COMMANDS:
        return
    if command.startswith("-") or command.endswith((".yaml", ".yml")):
        raise SettingsError(f"{command} is no command: flags and files come after one, as in `xrl train --config FILE`")
    near = nearest(command, COMMANDS)
    hint = f"; the nearest is {near}" if near else ""
    raise SettingsError(f"unknown command {shown(command)}{hint}, known are: {', '.join(COMMANDS)}")


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
    number = whole_number(text)
    if number is None or number < 1:
        raise SettingsError(f"{flag} needs a whole number >= 1, found {text!r}")
    return number, rest


if __name__ == "__main__":
    main()
