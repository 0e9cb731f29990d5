"""What an attempt at a run takes over from those before it, and leaves to those behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from xrl.algorithms import Algorithm
from xrl.assembly import Lead
from xrl.checkpoint.manifest import STEP_NAME
from xrl.checkpoint.parts import Stateful
from xrl.checkpoint.writer import StateWriter
from xrl.config import Settings
from xrl.experience.experience import Experience
from xrl.files.atomic_folder import remove_leftovers
from xrl.launch.progress import Progress
from xrl.metrics.run_folder import CHECKPOINT_NAME
from xrl.models.build import train_dtype
from xrl.models.shape import read_model_shape
from xrl.parallel.control import Control
from xrl.parallel.groups import ParallelGroups
from xrl.reporter import Reporter
from xrl.run_state import RunState, put_later_states_aside
from xrl.state_saving import StateKeeper, StateSaving
from xrl.weights.other_files import find_other_files
from xrl.weights.plan import num_parameters


def stateful_algorithm(algorithm: Algorithm) -> dict[str, Stateful]:
    """The algorithm, where it has a state: one of a user's own, say, with a coefficient that adapts."""
    has_state = hasattr(algorithm, "state_dict") and hasattr(algorithm, "load_state_dict")
    return {"algorithm": cast(Stateful, algorithm)} if has_state else {}


def lead_parts(lead: Lead, experience: Experience, reporter: Reporter) -> dict[str, Stateful]:
    """What of rank 0's goes on where it was."""
    return {
        "experience": experience,
        "learning": lead.watch,
        "journal": lead.journal,
        "checkpoints": lead.checkpoints,
        "reporter": reporter,
    }


def begin_behind(lead: Lead, step: int, *, is_shared: bool) -> None:
    """Make room in the run's folder for what comes behind a step: an earlier attempt may have come further.

    Args:
        is_shared: attempts at the run share its folder.
    """
    if not is_shared:
        return
    folder = lead.journal.folder
    remove_leftovers(folder.path, CHECKPOINT_NAME)
    remove_leftovers(folder.state, STEP_NAME)
    lead.checkpoints.goes_on = True
    if step == 0:
        lead.journal.begin_anew()
    if step or any(folder.tensorboard.glob("events.*")):
        lead.journal.begin_behind(step or -1)  # an evaluation before the first step comes anew, too
    put_later_states_aside(folder.state, step)


def build_state_saving(
    settings: Settings,
    groups: ParallelGroups,
    state: RunState,
    lead: Lead | None,
    progress: Progress,
    *,
    saved: Callable[[float], None],
) -> StateSaving:
    """Saves the run's state. Collective: rank 0 knows the folder.

    Args:
        saved: is told on rank 0 how long each save took, in seconds.
    """
    control = Control.of(groups)
    state_dir = control.gather(str(lead.journal.folder.state) if lead else "")[0]
    shape = read_model_shape(settings.model.model)
    others = find_other_files(settings.model.model, target=Path(state_dir)).num_bytes() if lead else 0
    reserve = num_parameters(shape) * train_dtype(settings.model).itemsize + others
    writer = StateWriter(
        Path(state_dir),
        control,
        file_name=state.actor.file_name,
        keep=settings.run.state_keep,
        reserve_bytes=reserve,
    )
    keeper = StateKeeper(journal=lead.journal, lead_part=state.lead_part) if lead else None
    interval = settings.run.state_interval
    return StateSaving(state, writer, keeper, control, progress, interval=interval, saved=saved)
