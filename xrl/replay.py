"""One recorded step, trained again: whether its update comes out as it did.

    xrl replay RUN_DIR --step 7                                       # on one rank
    torchrun --nproc-per-node 4 -m xrl.replay RUN_DIR --step 7        # at the layout of the run

It needs the samples of that step (--record-samples) and the state before it (--state-interval 1); no engine, no judge.
"""

from __future__ import annotations

if __name__ == "__main__":  # `python -m` put the current folder first: before anything is imported from there
    from xrl.launch.import_path import leave_current_folder

    leave_current_folder()

import dataclasses
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xrl.checkpoint.choose import SavedState
from xrl.checkpoint.manifest import step_folder
from xrl.config import ParallelConfig, Settings, SettingsError
from xrl.config.parse import parse_settings
from xrl.config.sentence_parser import SentenceParser
from xrl.launch.exit import run_main
from xrl.launch.start import prepare_process, without_collections
from xrl.launch.variables import rank_number
from xrl.metrics.run_folder import RunFolder
from xrl.metrics.sinks import read_rows


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A metric of the step, as it was logged and as it came out now."""

    name: str
    logged: float
    found: float

    @property
    def relative(self) -> float:
        """How far they are apart, as a share of the logged one; 0: equal to the bit."""
        if self.logged == self.found or (math.isnan(self.logged) and math.isnan(self.found)):
            return 0.0
        return abs(self.found - self.logged) / max(abs(self.logged), 1e-12)


def parser() -> SentenceParser:
    """Of its arguments."""
    found = SentenceParser(
        prog="xrl replay",
        description="Train one recorded step of a run again, from the state before it, and compare its metrics with "
        "those that were logged. The run must have had --record-samples, and --state-interval 1 (or a state just "
        "before that step). Exit code 0 where all of them are equal to the bit, 1 where one is not.",
    )
    found.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of the run")
    found.add_argument("--step", type=int, required=True, help="which rollout's update, from 1")
    return found


def replay(run_dir: Path, step: int) -> list[Difference]:
    """Train a step again; on rank 0, what its metrics are beside the logged ones, and nothing on the others.

    Raises:
        SettingsError: the folder does not have what it takes.
    """
    folder = RunFolder(run_dir)
    if not folder.config.is_file():
        raise SettingsError(f"RUN_DIR {run_dir} is no run's folder: it has no {folder.config.name}")
    world_size = rank_number(os.environ, "WORLD_SIZE", 1)
    settings = _at_world(parse_settings(["--config", str(folder.config)]), world_size)
    logged = _logged(folder, step)
    if not folder.samples(step).is_file():
        raise SettingsError(f"{folder.samples(step)} is missing: a run records samples with --record-samples")
    state = _state_before(folder, settings, step)
    found = _learn_again(settings, folder.samples(step), state)
    return [
        Difference(name=name, logged=logged[name], found=value)
        for name, value in found.items()
        if name in logged and logged[name] is not None
    ]


def _at_world(settings: Settings, world_size: int) -> Settings:
    """The settings of the run, on one rank where that is all there is."""
    if world_size > 1:
        return settings
    parallel = ParallelConfig(distributed_timeout_minutes=settings.parallel.distributed_timeout_minutes)
    return dataclasses.replace(settings, parallel=parallel)


def _logged(folder: RunFolder, step: int) -> Mapping[str, float]:
    try:
        rows = read_rows(folder.metrics)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{folder.metrics} cannot be read: {error}") from error
    for row in rows:
        if row["step"] == step and "updates" in row:
            return row
    raise SettingsError(f"{folder.metrics} has no row of an update at step {step}")


def _state_before(folder: RunFolder, settings: Settings, step: int) -> SavedState | None:
    """None: the step was the first, and learned with the weights of --model."""
    if step == 1:
        return None
    before = step_folder(folder.state, step - 1)
    if not before.is_dir():
        raise SettingsError(f"{before} is missing: step {step} learned from there (--state-interval 1, --state-keep)")
    return SavedState.at(before)


def _num_updates(settings: Settings, state: SavedState | None) -> int:
    """Of the whole run, which the learning rate may depend on."""
    journal = state.manifest.parts.get("journal", {}) if state else {}
    num_rollouts = journal.get("num_rollouts") or settings.data.num_rollouts
    if num_rollouts is None:
        raise SettingsError("the first step of a run by --num-epochs cannot be replayed: how long it is, is not saved")
    return int(num_rollouts) * settings.algorithm.updates_per_rollout


def _learn_again(settings: Settings, samples: Path, state: SavedState | None) -> dict[str, float]:
    """The metrics of the step's updates together; on rank 0, empty on the others. Collective."""
    # Imported here: what is missing is said without waiting for torch.
    with without_collections():
        from xrl.parallel.cpu import prepare_megatron_for_cpu

        prepare_megatron_for_cpu()

        import torch

        from xrl.actor.actor import Actor
        from xrl.actor.state import ActorState
        from xrl.algorithms import create_algorithm
        from xrl.attempts import stateful_algorithm
        from xrl.checkpoint.parts import give_states
        from xrl.checkpoint.samples import read_samples
        from xrl.kernels.threads import use_threads
        from xrl.parallel.megatron import initialize, shutdown
        from xrl.reporter import update_metrics

    groups = initialize(settings.parallel, seed=settings.run.seed)
    try:
        algorithm = create_algorithm(settings.algorithm)
        actor = Actor(
            model=settings.model,
            parallel=settings.parallel,
            optimizer=settings.optimizer,
            packing=settings.data.packing,
            groups=groups,
            num_updates=_num_updates(settings, state),
            keeps_reference=bool(algorithm.settings.kl_coef),
        )
        if groups.device.type == "cpu":
            use_threads(torch.get_num_threads(), num_parameters=actor.num_parameters)
        if state is not None:
            ActorState(actor).load(state)
            give_states(stateful_algorithm(algorithm), state.manifest.parts, {})
        updates = actor.learn(read_samples(samples) if groups.rank == 0 else None, algorithm)
        return update_metrics(updates) if groups.rank == 0 else {}
    finally:
        shutdown()


def report(differences: Sequence[Difference]) -> bool:
    """Print a line a metric that differs; returns whether none does."""
    others = [each for each in differences if each.relative > 0]
    for each in sorted(others, key=lambda each: -each.relative):
        print(f"{each.name}: {each.found!r}, logged {each.logged!r} ({each.relative:.1e} of it)")
    print(f"{len(differences) - len(others)} of {len(differences)} metrics are equal to the bit")
    return not others


def main(argv: Sequence[str] | None = None) -> None:
    """Replay as the command line says."""
    arguments = parser().parse_args(argv)
    found = replay(arguments.run_dir, arguments.step)
    if rank_number(os.environ, "RANK", 0) == 0 and not report(found):
        sys.exit(1)


if __name__ == "__main__":
    prepare_process()
    run_main(lambda: main(sys.argv[1:]))
