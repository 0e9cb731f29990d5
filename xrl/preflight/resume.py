"""The run's folder, and the saved state that it goes on from: nothing of another run's is mixed with it."""

from __future__ import annotations

from xrl.checkpoint.changes import identity, refuse_another_run
from xrl.checkpoint.choose import state_to_resume
from xrl.checkpoint.manifest import saved_steps
from xrl.config import Settings, SettingsError
from xrl.metrics.run_folder import RunFolder, check_run_dir
from xrl.models.shape import ModelShape


def check_resume(settings: Settings, shape: ModelShape) -> None:
    """Refuse a state that this run cannot go on from, and a folder in which it would write over a finished one.

    Raises:
        SettingsError: with the file or flag, what was found, and what is needed.
    """
    run = settings.run
    if run.run_dir is not None:
        check_run_dir(run.run_dir)
    state = state_to_resume(run).state
    if state is not None and run.run_dir is not None and RunFolder(run.run_dir).config.is_file():
        own = RunFolder(run.run_dir).state
        is_own = state.folder.parent.resolve() == own.resolve()
        if not is_own and saved_steps(own):
            raise SettingsError(
                f"--resume {run.resume} is of another run's folder, and --run-dir {run.run_dir} has states of its own: "
                f"use a new folder, or --resume auto to go on from those"
            )
    if state is not None:
        refuse_another_run(state.manifest.identity, identity(settings, shape), state.folder)
        return
    if run.run_dir is not None and RunFolder(run.run_dir).final_checkpoint.is_dir():
        raise SettingsError(
            f"--run-dir {run.run_dir} has a finished model (hf-final) and no saved state to go on from: a run would "
            f"write over it: use another --run-dir, and --state-interval to save states"
        )
