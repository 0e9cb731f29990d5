"""What a run that ends early leaves behind, and where: for the line about its end.

Read from its folder, so that it is true whatever ended the run, and can be said by another process: ranks of
`xrl train` leave that to the command above them, which outlives them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from xrl.config import SettingsError
from xrl.config.numbers import numbered
from xrl.files.disk import NotWritten
from xrl.launch.exit import RunEnded, RunStopped, agents_file
from xrl.metrics.run_folder import RunFolder
from xrl.metrics.sinks import read_rows
from xrl.metrics.status import Status, status_at_end

logger = logging.getLogger(__name__)


@dataclass
class Ending:
    """Knows the run's folder as soon as there is one, how far it is to go as soon as that is known, and has come."""

    folder: RunFolder | None = None
    num_rollouts: int | None = None
    num_learned: int = 0
    _has_ended: bool = field(default=False, init=False)

    def begin(self, folder: RunFolder) -> None:
        """The run has a folder."""
        self.folder = folder
        self._tell_agent()
        self._write(Status(state="running", step=self.num_learned, sentence=""))

    def expect(self, num_rollouts: int) -> None:
        """The run has so many rollouts to make."""
        self.num_rollouts = num_rollouts
        self._tell_agent()

    def learned(self, index: int) -> None:
        """So many rollouts are learned from: more than the folder knows of where its disk is full."""
        self.num_learned = index
        self._tell_agent()

    def words_about(self, error: BaseException) -> str:
        """What to say beside the error that ends the run; empty where that says it all, or another process says it.

        It is written down as the run's end, too: before clean-up, which may hang.
        """
        self.end(error)
        file = agents_file()
        if isinstance(error, SettingsError | RunStopped) or (isinstance(error, RunEnded) and error.says_where):
            _leave(file, "")  # nor has the command above anything to add
            return ""
        if file is not None or self.folder is None:
            return ""
        return where_things_are(self.folder, self.num_rollouts, num_learned=self.num_learned)

    def end(self, error: BaseException | None) -> None:
        """The run ends, with `error` or without one; what is said first holds."""
        if self.folder is None or self._has_ended:
            return
        self._has_ended = True
        words = where_things_are(self.folder, self.num_rollouts, num_learned=self.num_learned) if error else ""
        step = max(rollouts_done(self.folder), self.num_learned)
        self._write(status_at_end(error, step=step, words=words))

    def _write(self, status: Status) -> None:
        assert self.folder is not None
        try:
            status.write(self.folder.status)
        except NotWritten as error:  # a full disk: no reason to end a run, nor to end it otherwise
            logger.warning("%s", error)

    def _tell_agent(self) -> None:
        if self.folder is not None:
            _leave(agents_file(), json.dumps([str(self.folder.path), self.num_rollouts, self.num_learned]))


def words_of_ranks(file: Path) -> str:
    """What the ranks of a run have left to say in their agent's file; empty where that is nothing."""
    try:
        folder, num_rollouts, num_learned = json.loads(file.read_text())
    except (OSError, ValueError):  # nothing is left there, or not all of it
        return ""
    return where_things_are(RunFolder(Path(folder)), num_rollouts, num_learned=num_learned)


def note_end_of_ranks(file: Path, sentence: str, is_news: bool) -> None:
    """The ranks have ended by an error: where rank 0 could not write that into the run's folder, do it now.

    Args:
        file: their agent's, in which they left where that folder is.
        is_news: no rank knows that error: a rank was killed, and what rank 0 wrote was that it was stopped.
    """
    try:
        folder = RunFolder(Path(json.loads(file.read_text())[0]))
    except (OSError, ValueError):  # they said it themselves
        return
    status = Status.read(folder.status)
    if status is not None and (status.state == "running" or (status.state == "failed" and is_news)):
        with contextlib.suppress(NotWritten):
            Status(state="failed", step=rollouts_done(folder), sentence=sentence).write(folder.status)


def _leave(file: Path | None, text: str) -> None:
    if file is not None:
        draft = file.with_name(f"{file.name}.draft")  # a rank may be killed in the middle of it
        with contextlib.suppress(OSError):  # a full disk: the run does without this line
            draft.write_text(text)
            os.replace(draft, file)


def where_things_are(folder: RunFolder, num_rollouts: int | None, *, num_learned: int = 0) -> str:
    """How far a run came and what of it is on disk, to go after "stopped" or "ended".

    Args:
        num_rollouts: of the whole run; None where that was not known yet.
        num_learned: rollouts that were learned from, where the folder may know of fewer.
    """
    done = max(rollouts_done(folder), num_learned)
    return f"{how_far(done, num_rollouts)}; run folder {folder.path}; {saved_models(folder)}"


def how_far(num_learned: int, num_rollouts: int | None) -> str:
    """How far a run came, to go after "stopped" or "ended"."""
    of = f" of {num_rollouts:,}" if num_rollouts else ""
    return f"after rollout {num_learned:,}{of}" if num_learned else "before the first rollout was learned from"


def rollouts_done(folder: RunFolder) -> int:
    """Rollouts that were learned from and whose weights went out."""
    try:
        rows = read_rows(folder.metrics)
    except (OSError, ValueError):  # a run that never began, or a file that somebody else has touched
        return 0
    return max((int(row["step"]) for row in rows if "updates" in row), default=0)


def saved_models(folder: RunFolder) -> str:
    """The newest model in a run's folder, and how to go on from it."""
    try:
        newest = folder.newest_checkpoint
    except OSError as error:
        return f"whose checkpoints cannot be read: {error.strerror or error}"
    state = newest_state(folder)
    words = []
    if state is not None:
        words.append(f"the same flags with --run-dir {folder.path} go on from {state}")
    if newest is not None:
        words.append(f"saved: {newest.name} (the newest); a new run can start from it with --model {newest}")
    return "; ".join(words) or (
        "no checkpoint yet (--state-interval N saves the run's state every N rollouts, --save-interval N its model)"
    )


def newest_state(folder: RunFolder) -> str | None:
    """The name of the newest saved state in a run's folder."""
    try:
        names = [path.name for path in folder.state.iterdir()]
    except OSError:
        return None
    steps = [step for name in names if (step := numbered(name, "step-")) is not None]
    return f"step-{max(steps)}" if steps else None
