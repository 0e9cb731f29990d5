"""How a run is, in one line of JSON: for a script that must decide whether to start it again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from xrl.config import SettingsError
from xrl.files.whole import write_whole
from xrl.launch.exit import RunHung, RunStopped, describe, exit_code
from xrl.launch.stop import EXIT_STOPPED

# running      it is, or its processes were killed before they could say otherwise
# saved        it was asked to stop, and nothing is lost: start it again
# done         all rollouts are learned from
# bad-settings it cannot work like this: mend the settings first
# failed       something went wrong; what it has saved is still there
State: TypeAlias = Literal["running", "saved", "done", "bad-settings", "failed"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """What status.json says."""

    state: State
    step: int  # rollouts that are learned from
    sentence: str  # how it ended; empty while it runs

    def write(self, file: Path) -> None:
        """Replace the file.

        Raises:
            NotWritten: it is as it was.
        """
        fields = {"state": self.state, "step": self.step, "sentence": self.sentence}
        write_whole(file, (json.dumps(fields) + "\n").encode())

    @staticmethod
    def read(file: Path) -> Status | None:
        """What a file says; None where it says nothing that a run would."""
        try:
            said = json.loads(file.read_text())
            found = Status(state=said["state"], step=int(said["step"]), sentence=str(said["sentence"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if found.state in get_args(State) else None


def status_at_end(error: BaseException | None, *, step: int, words: str = "") -> Status:
    """What is to be said of a run that ends with `error`, or without one.

    Args:
        words: how far it came, to go after "stopped by SIGTERM".
    """
    if error is None:
        return Status(state="done", step=step, sentence="")
    state: State = "failed"
    if isinstance(error, SettingsError):
        state = "bad-settings"
    elif isinstance(error, RunHung):
        state = "failed"
    elif exit_code(error) == EXIT_STOPPED and not (isinstance(error, RunStopped) and not error.loses_nothing):
        state = "saved"
    said = describe(error, words).rstrip()
    # Of a traceback the last line says what happened.
    lines = [line for line in said.splitlines() if line.startswith("xrl: ")] or said.splitlines() or [""]
    return Status(state=state, step=step, sentence=lines[0].removeprefix("xrl: ").removeprefix("error: "))
