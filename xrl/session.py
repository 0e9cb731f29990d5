"""A run's parts in one place: what `xrl train` trains with, and what a loop of one's own does."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

import torch  # noqa: E402

from xrl.actor.actor import Actor  # noqa: E402
from xrl.actor.state import ActorState  # noqa: E402
from xrl.algorithms import Algorithm, create_algorithm  # noqa: E402
from xrl.assembly import (  # noqa: E402
    Lead,
    build_experience,
    build_hooks,
    build_lead,
    build_publisher,
    build_reporter,
    build_stopping,
    build_turns,
    share_rollout_count,
)
from xrl.attempts import begin_behind, build_state_saving, lead_parts, stateful_algorithm  # noqa: E402
from xrl.config import Settings, SettingsError  # noqa: E402
from xrl.experience.asking import Need  # noqa: E402
from xrl.experience.experience import Batch, Experience  # noqa: E402
from xrl.experience.turns import DeviceTurns, TurnTakingLearner  # noqa: E402
from xrl.hooks import Evaluation  # noqa: E402
from xrl.kernels.threads import use_threads  # noqa: E402
from xrl.launch.exit import RunStopped, announce_errors  # noqa: E402
from xrl.launch.progress import Progress  # noqa: E402
from xrl.launch.stop import StopRequest  # noqa: E402
from xrl.metrics.ending import Ending  # noqa: E402
from xrl.metrics.run_folder import RunFolder  # noqa: E402
from xrl.parallel.control import Control  # noqa: E402
from xrl.parallel.megatron import initialize, shutdown  # noqa: E402
from xrl.rollout.fleet import Fleet  # noqa: E402
from xrl.rollout.publisher import Published, Publisher  # noqa: E402
from xrl.run_state import RunState, choose_state  # noqa: E402
from xrl.state_saving import SettlingExperience, StateSaving  # noqa: E402
from xrl.trainer import Hook, Trainer  # noqa: E402
from xrl.watching import watch_ranks, write_whereabouts  # noqa: E402

if TYPE_CHECKING:
    from xrl.parallel.groups import ParallelGroups
    from xrl.rewards import Judge

logger = logging.getLogger("xrl")


class Session:
    """This rank's parts of a run, built from settings on entry and ended on the way out. Every rank makes one.

    with xrl.Session(settings, judge=my_judge) as run:
        run.publish(version=run.first_step)
        for step in range(run.first_step + 1, run.num_steps + 1):
            run.actor.learn(run.take(step).samples, run.algorithm)
            run.publish(version=step)
    """

    groups: ParallelGroups
    """Where this rank stands, and the process groups it talks through."""
    actor: Actor
    """The model that is trained, this rank's share of it."""
    fleet: Fleet | None
    """The rollout workers; None on ranks other than 0."""
    experience: Experience
    """Batches of judged and scored answers."""
    publisher: Publisher
    """Gives the actor's weights to the workers."""
    num_steps: int
    """Rollouts that the settings ask for."""
    first_step: int
    """Those of them that an earlier attempt has learned from: the next one is behind them."""
    is_done: bool
    """Whether that attempt came to the end, and left its last model."""
    state_saving: StateSaving
    """Saves the state of the run; a hook of `trainer`."""

    def __init__(
        self,
        settings: Settings,
        *,
        judge: Judge | None = None,
        algorithm: Algorithm | None = None,
        ending: Ending | None = None,
        stop: StopRequest | None = None,
        groups: ParallelGroups | None = None,
    ) -> None:
        """
        Args:
            judge: `(response, prompt) -> reward`, asked in rank 0's own process; default: the one that --judge names,
                behind its bounds.
            algorithm: default: the one that --algorithm names.
            ending: is told how far the run comes, and announces errors: for a process that ends with the run.
            stop: ends the trainer's loop, with a saved state, when it is asked.
            groups: made before by `xrl.parallel.megatron.initialize`, and left as they are; default: made here.
        """
        self.settings = settings
        self.algorithm = algorithm or create_algorithm(settings.algorithm)
        self.progress = Progress()
        self._judge, self._ending, self._given_groups = judge, ending or Ending(), groups
        self._stop = stop or StopRequest()
        self._announces = ending is not None
        self._stack = contextlib.ExitStack()
        self._lead: Lead | None = None
        self._turns: DeviceTurns | None = None
        self._version = 0  # of the weights that the workers have

    def __enter__(self) -> Session:
        words_about, stop = self._ending.words_about, self._stop
        announced = announce_errors(words_about, stop) if self._announces else contextlib.nullcontext()
        with contextlib.ExitStack() as stack, announced:
            self._build(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.end(error)
        self._stack.__exit__(kind, error, trace)

    @property
    def folder(self) -> RunFolder | None:
        """Where the run writes; None on ranks other than 0."""
        return self._lead.journal.folder if self._lead else None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which samples, judges and writes."""
        return self._lead is not None

    def take(self, step: int) -> Batch:
        """The batch of a step; the weights are published once more where the workers need it. Collective.

        Where actor and engines share devices, it is the actor's turn from here to the next `publish`.
        """
        while isinstance(batch := self.experience.take(step), Need):
            if batch is Need.STOP:
                raise RunStopped("stopped as it was asked to; the run's state was not saved", loses_nothing=False)
            self._publish_again()
        if self._turns is not None:
            self._turns.to_actor()
        return batch

    def publish(self, *, version: int) -> Published:
        """Give the weights to every worker; what is sampled from then on carries `version`. Collective."""
        self._version = version
        return self.publisher.publish(version=version)

    def trainer(self, *, hooks: Sequence[Hook] = (), kind: type[Trainer] = Trainer) -> Trainer:
        """The loop of `xrl train`.

        Args:
            hooks: called as `Trainer` says: after checkpoints and evaluation, and before the run's state is saved.
            kind: `Trainer`, or a subclass with a step of its own.
        """
        learner = self.actor if self._turns is None else TurnTakingLearner(self.actor, self._turns)
        stopping = build_stopping(
            self.settings, self.groups, self._lead, self._stop, self.state_saving, first_step=self.first_step
        )
        return kind(
            SettlingExperience(self.experience, self.state_saving),
            learner,
            self.algorithm,
            self.publisher,
            self.reporter,
            num_steps=self.num_steps,
            first_step=self.first_step,
            hooks=[
                *build_hooks(
                    self.settings, self.groups, self.actor, self._lead, self.progress, self.state_saving, own=hooks
                ),
                stopping,
            ],
            stopping=stopping,
            progress=self.progress,
        )

    def evaluate(self) -> dict[str, float]:
        """Pass rates on the held-out prompts of --eval-data; on rank 0, empty on the others. Collective."""
        evaluation = Evaluation(self._lead.evaluator if self._lead else None, None, Control.of(self.groups))
        return dict(evaluation.rates(self._publish_again))

    def _build(self, stack: contextlib.ExitStack) -> None:
        settings, lead = self.settings, None
        if self._given_groups is None:
            self.groups = initialize(settings.parallel, seed=settings.run.seed)
            stack.callback(shutdown)
        else:
            self.groups = self._given_groups
        # One rank alone, in a notebook say, may do nothing for as long as its owner likes; several need a store.
        is_watched = "MASTER_ADDR" in os.environ if self.groups.layout.world_size > 1 else self._announces
        if is_watched:
            stack.callback(watch_ranks(settings, self.groups, self.progress, self._ending).close)
        if self.groups.rank == 0:
            lead = build_lead(settings, self.groups, stack, self._ending, self.progress, judge=self._judge)
            if is_watched:
                write_whereabouts(lead.journal.folder, world_size=self.groups.layout.world_size)
            self.progress.waits_for = lead.fleet.waits_for
        self._lead = lead
        self.fleet = lead.fleet if lead else None
        self.num_steps = share_rollout_count(lead, self.groups)
        self._ending.expect(self.num_steps)
        algorithm = self.algorithm.settings
        self.actor = Actor(
            model=settings.model,
            parallel=settings.parallel,
            optimizer=settings.optimizer,
            packing=settings.data.packing,
            groups=self.groups,
            num_updates=self.num_steps * algorithm.updates_per_rollout,
            keeps_reference=bool(algorithm.kl_coef),
            progress=self.progress,
        )
        self.experience = build_experience(settings, self.groups, self.algorithm, lead, check_stop=self._stop.check)
        self.reporter = build_reporter(settings, self.groups, self.actor, lead)
        self._go_on()
        self._turns = build_turns(settings, self.groups, self.actor, lead)
        self.publisher = build_publisher(settings, self.groups, self.actor, lead, self._turns, self.progress)
        if self.groups.device.type == "cpu":
            use_threads(torch.get_num_threads(), num_parameters=self.actor.num_parameters)
        gc.collect()
        stack.callback(gc.unfreeze)
        gc.freeze()  # modules and models stay: collections need not go through them again, many times a step

    def _go_on(self) -> None:
        """From the newest saved state, if there is one. Collective."""
        control, lead = Control.of(self.groups), self._lead
        state = RunState(
            self.settings,
            self.actor.shape,
            ActorState(self.actor),
            control,
            everywhere=stateful_algorithm(self.algorithm),
            on_lead=lead_parts(lead, self.experience, self.reporter) if lead else {},
            keeps_reference=self.actor.reference is not None,
        )
        saved = choose_state(self.settings.run, control)
        self.first_step = saved.manifest.step if saved else 0
        if lead:
            if self.first_step > self.num_steps:
                raise SettingsError(
                    f"{saved.folder if saved else ''} is of rollout {self.first_step}, which is more than the "
                    f"{self.num_steps} of this run: raise --num-rollouts"
                )
            # Whatever stops this process in between: no later state is taken, whose metrics are cut already.
            begin_behind(lead, self.first_step, is_shared=self.settings.run.run_dir is not None)
        if saved is not None:
            state.load(saved)
        self._ending.learned(self.first_step)
        has_model = lead is not None and lead.journal.folder.final_checkpoint.is_dir()
        self.is_done = control.agree(0 < self.num_steps <= self.first_step and has_model)
        self.state_saving = build_state_saving(
            self.settings, self.groups, state, lead, self.progress, saved=self._stop.saved
        )

    def _publish_again(self) -> None:
        logger.warning("no rollout worker is ready: weights version %d are published once more", self._version)
        self.publisher.publish(version=self._version)
