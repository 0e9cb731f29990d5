"""Everything of a run that has a state: put together for a save, chosen and given back when the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from xrl.actor.state import ActorState
from xrl.checkpoint.changes import differences, flat_settings, identity, refuse_another_run
from xrl.checkpoint.choose import Choice, SavedState, put_aside, state_to_resume
from xrl.checkpoint.files import checksums
from xrl.checkpoint.manifest import LEAD_FILE, Manifest, Unusable, saved_steps, step_folder
from xrl.checkpoint.parts import Stateful, give_states, take_states
from xrl.checkpoint.writer import LeadPart
from xrl.config import RunConfig, Settings
from xrl.config.paths import absolute_paths
from xrl.kernels.threads import num_threads
from xrl.launch.exit import RunEnded
from xrl.models.shape import ModelShape
from xrl.parallel.control import Control
from xrl.weights.weight_files import SINGLE_FILE, weight_map

logger = logging.getLogger("xrl")

# A run's numbers depend on them.
_PACKAGES = ("xrl", "torch", "megatron-core", "transformer-engine", "transformers", "tokenizers", "numpy", "lmdeploy")


class RunState:
    """This rank's view of it: `pieces` of the model on every rank, the rest on rank 0."""

    def __init__(
        self,
        settings: Settings,
        shape: ModelShape,
        actor: ActorState,
        control: Control,
        *,
        everywhere: Mapping[str, Stateful],
        on_lead: Mapping[str, Stateful],
        keeps_reference: bool,
    ) -> None:
        """Collective.

        Args:
            everywhere: parts whose state is the same on every rank; rank 0 saves it, each loads it.
            on_lead: parts of rank 0; empty on the others.
            keeps_reference: the run compares with the weights that it began from: they must be the same.
        """
        self.actor = actor
        self._settings, self._control = settings, control
        self._everywhere, self._on_lead = everywhere, on_lead
        self._identity = identity(settings, shape) if control.leads else {}
        if keeps_reference:
            self._identity["reference"] = _weights_checksums(settings.model.model, control)

    def pieces(self) -> Mapping[str, torch.Tensor]:
        """What this rank has to write of the model, by its names in the file: views."""
        return self.actor.pieces()

    def lead_part(self, step: int) -> LeadPart:
        """What rank 0 adds."""
        values, arrays = take_states({**self._everywhere, **self._on_lead})
        manifest = Manifest(
            step=step,
            num_updates=self.actor.num_updates,
            cut=self.actor.cut,
            files={},
            identity=self._identity,
            circumstances=self._circumstances(),
            settings=flat_settings(absolute_paths(self._settings)),
            schedule=self.actor.schedule(),
            parts=values,
        )
        return LeadPart(manifest=manifest, arrays=arrays)

    def load(self, saved: SavedState) -> None:
        """Go on from a state. Collective.

        Raises:
            Unusable: it is another run's, or damaged.
        """
        manifest = saved.manifest
        if self._control.leads:
            refuse_another_run(manifest.identity, self._identity, saved.folder)
        self.actor.load(saved)
        arrays = load_file(saved.folder / LEAD_FILE) if LEAD_FILE in manifest.files else {}
        give_states({**self._everywhere, **self._on_lead}, manifest.parts, arrays)
        if self._control.leads:
            self._say_what_differs(saved)
        self._control.meet()

    def _say_what_differs(self, saved: SavedState) -> None:
        manifest = saved.manifest
        logger.info("goes on from %s, behind rollout %d", saved.folder, manifest.step)
        settings = flat_settings(absolute_paths(self._settings))
        for words, counts in differences(manifest.settings, settings, manifest.circumstances, self._circumstances()):
            logger.info("%s %s", "continues, not bitwise, because" if counts else "continues, and", words)
        why = _why_not_repeatable(self._settings)
        if why:
            logger.info("continues from the exact state; what it samples does not repeat to the bit: %s", why)

    def _circumstances(self) -> dict[str, Any]:
        versions = {}
        for package in _PACKAGES:
            try:
                versions[f"version of {package}"] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        on_cuda = torch.cuda.is_available()
        return {
            "layout": str(self.actor.cut.layout),
            "device": torch.cuda.get_device_name() if on_cuda else "cpu",
            "threads_of_a_rank": num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            **versions,
        }


def choose_state(run: RunConfig, control: Control) -> SavedState | None:
    """The state that a run goes on from, whose every byte is as it was written; None: it begins at the beginning.

    A damaged one is named and put aside, and the one before it is taken; one that was asked for by its path is refused.
    Collective.

    Raises:
        SettingsError: see `state_to_resume`; and Unusable: the named state is damaged. On rank 0.
    """
    damaged: dict[Path, str] = {}
    while True:
        choice = state_to_resume(run, without=damaged) if control.leads else Choice(state=None)
        damaged |= dict(choice.damaged)
        found = control.gather(None if choice.state is None else str(choice.state.folder))[0]
        if found is None:
            return None
        state = SavedState.at(Path(found))
        fault = _damaged_file(state, control)
        if fault is None:
            break
        if run.resume != "auto":
            raise Unusable(fault) if control.leads else RunEnded()
        damaged[state.folder] = fault
    for folder, why in damaged.items() if control.leads else ():
        logger.warning("%s: it is not used, and is %s from now on", why, put_aside(folder, "damaged").name)
    return state


def put_later_states_aside(state_dir: Path, step: int) -> None:
    """A run goes on behind `step`: states of later steps, of a future that is not this one's, are found no more."""
    for later in saved_steps(state_dir):
        if later > step:
            aside = put_aside(step_folder(state_dir, later), "superseded")
            logger.warning("%s is newer than the state that the run goes on from: it is %s now", later, aside)


def _damaged_file(state: SavedState, control: Control) -> str | None:
    """The first file whose bytes are not those that were written, in a sentence. Collective."""
    names = list(state.manifest.files)
    for name, found in zip(names, checksums([state.folder / name for name in names], control), strict=True):
        record = state.manifest.files[name]
        if found != record.checksum:
            return (
                f"{state.folder / name}, written by rank {record.rank}, has checksum {found}, it was written with "
                f"{record.checksum}"
            )
    return None


def _weights_checksums(model: Path, control: Control) -> dict[str, str]:
    """Of the files that hold a model's weights. Collective."""
    files = weight_map(model)
    names = [SINGLE_FILE] if files is None else sorted(set(files.values()))
    return dict(zip(names, checksums([model / name for name in names], control), strict=True))


def _why_not_repeatable(settings: Settings) -> str:
    if settings.rollout.engine != "embedded":
        return f"--engine {settings.rollout.engine} computes an answer differently beside others"
    if torch.cuda.is_available():
        return "sums on a GPU are taken in no fixed order"
    if settings.rollout.partial_rollout and settings.rollout.partial_rollout_tokens is None:
        return "--partial-rollout ends rollouts by the clock"
    return ""
