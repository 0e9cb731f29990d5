"""The tokenizer and the prompts of a run, tried out before anything is started, in a process of its own.

transformers takes a second to import, and its loaders raise what they like at damaged files, or use up the memory: a
process of its own bounds all of that. It does what rank 0 will do, by the same functions, and hands on what they
refuse. transformers needs no torch for it, and goes without, which halves the time.

    python -P -m xrl.data.trial QUESTION      QUESTION and the answer on stdout are JSON
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from xrl.config import SettingsError
from xrl.config.printable import shortened
from xrl.launch.children import child_environment, module_command
from xrl.launch.hearing import unblock_signals
from xrl.launch.signals import stop_with_parent
from xrl.launch.start import forgive_warnings_of_others

# Of the whole trial, the import of transformers from a slow disk included.
DEADLINE_S = 300.0
# Of memory that may be asked for: much more than any tokenizer needs, and as much again for each byte of the data.
MEMORY_BYTES = 16 * 2**30
MEMORY_PER_DATA_BYTE = 32
# Of each file, from its start: a long file shall not be tokenised twice before the first update.
MOST_ROWS = 50_000
# What keeps the memory that is asked for in proportion to the work, on machines with hundreds of cores.
_FEW_THREADS = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "8"}
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
# Of what a library says: it may quote the whole file.
MAX_REASON_CHARS = 500
# A process that was killed is gone at once, but for one that hangs in the kernel.
_END_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be tried."""

    model: str  # folder
    vocab_size: int  # of the model
    data: str
    eval_data: str | None
    max_prompt_length: int


class Trial:
    """The process, from `with` on: it works while other things are checked, and ends with the block."""

    def __init__(self, question: Question) -> None:
        self.question = question

    def __enter__(self) -> Trial:
        few = {name: value for name, value in _FEW_THREADS.items() if name not in os.environ}
        self.process = subprocess.Popen(
            [*module_command("xrl.data.trial"), json.dumps(dataclasses.asdict(self.question))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**child_environment(), **few, **_QUIET},
            # Out of the terminal's process group: Ctrl-C reaches us, and we end it.
            process_group=0,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.communicate(timeout=_END_S)

    def num_prompts(self) -> int | None:
        """Wait for the end of the trial: how many training prompts are short enough; None: not all were tried.

        Raises:
            SettingsError: what rank 0 would refuse, or what the process ended of.
        """
        who = f"the tokenizer in {self.question.model}"
        try:
            out, errors = self.process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired as error:
            raise SettingsError(f"{who} was not loaded and tried out within {DEADLINE_S:g} s") from error
        try:
            answer = json.loads(out)
        except ValueError as error:  # it ended before it could say anything
            raise SettingsError(f"{who} ended the process that tried it out: {self._end(errors)}") from error
        if "refused" in answer:
            raise SettingsError(answer["refused"])
        number: int | None = answer["num_prompts"]
        return number

    def _end(self, errors: bytes) -> str:
        code = self.process.returncode
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        lines = errors.decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"{how}, {last}" if last else how


def answer_to(question: Question) -> dict[str, Any]:
    """What the process answers: `num_prompts` as `Trial` gives it, or what is `refused`, as a sentence."""
    try:
        return {"num_prompts": _tried(question)}
    except SettingsError as error:
        return {"refused": str(error)}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the libraries raise what they like, a panic too
        reason = shortened(f"{type(error).__name__}: {error}", MAX_REASON_CHARS)
        return {"refused": str(SettingsError(f"the tokenizer in {question.model} cannot be used: {reason}"))}


def _tried(question: Question) -> int | None:
    from xrl.data.prompts import PromptDataset
    from xrl.data.tokenizer import load_tokenizer, stop_token_ids

    model = Path(question.model)
    tokenizer = load_tokenizer(model)
    for token_id in stop_token_ids(model, tokenizer):
        if not 0 <= token_id < question.vocab_size:
            raise SettingsError(
                f"{model / 'tokenizer_config.json'}: eos_token {tokenizer.eos_token!r} has id {token_id}, but the "
                f"model's vocab_size is {question.vocab_size}"
            )
    counts = []
    for path in (question.data, question.eval_data):
        if path is None:
            continue
        prompts = PromptDataset(
            Path(path),
            tokenizer,
            max_prompt_length=question.max_prompt_length,
            seed=0,
            shuffle=False,
            most_rows=MOST_ROWS,
        )
        prompts.check_ids(tokenizer, vocab_size=question.vocab_size)
        is_whole = len(prompts) + prompts.num_dropped < MOST_ROWS
        counts.append(len(prompts) if is_whole else None)
    return counts[0]


def leave_torch_alone() -> None:
    """From now on there is no torch: transformers does without it what tokenizers need."""
    sys.modules["torch"] = None  # type: ignore[assignment]


def bound_memory(question: Question) -> None:
    """Whatever a damaged file makes a library ask for, this process gets no more than is in proportion."""
    num_bytes = MEMORY_BYTES
    for path in (question.data, question.eval_data):
        with contextlib.suppress(OSError, ValueError):
            num_bytes += MEMORY_PER_DATA_BYTE * os.stat(path or "").st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    for limit in (soft, hard):
        num_bytes = num_bytes if limit == resource.RLIM_INFINITY else min(num_bytes, limit)
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, hard))


def main() -> None:
    unblock_signals()
    # The answer alone goes to stdout: whatever a library prints there would spoil it.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    forgive_warnings_of_others()
    question = Question(**json.loads(sys.argv[1]))
    stop_with_parent()
    bound_memory(question)
    leave_torch_alone()
    with out:
        json.dump(answer_to(question), out)


if __name__ == "__main__":
    main()
