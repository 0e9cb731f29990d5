"""Puts the parts of a run together, as its settings ask for them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist

from xrl.actor.actor import Actor
from xrl.algorithms import Algorithm
from xrl.config import Settings, SettingsError
from xrl.config.parse import dump_settings
from xrl.config.paths import absolute_paths
from xrl.data.prompts import PromptDataset, rollouts_of
from xrl.data.tokenizer import load_tokenizer, stop_token_ids
from xrl.experience.collect import Collector
from xrl.experience.evaluate import Evaluator
from xrl.experience.experience import Experience, SampledRollouts
from xrl.experience.turns import DeviceTurns, TurnTakingPublisher
from xrl.files.disk import NotWritten
from xrl.files.whole import write_whole
from xrl.hooks import Checkpointing, Ending, Evaluation, Keeper
from xrl.launch.progress import Progress
from xrl.launch.stop import StopRequest, TimeLimit, job_start
from xrl.metrics.ending import Ending as HowItEnds
from xrl.metrics.environment import write_environment
from xrl.metrics.journal import Journal
from xrl.metrics.learning import LearningWatch
from xrl.metrics.learning_words import LearningWords, no_stop_token
from xrl.metrics.report import start_lines
from xrl.metrics.run_folder import RunFolder
from xrl.models.build import train_dtype
from xrl.models.choice import layer_lines
from xrl.models.shape import read_model_shape
from xrl.parallel.control import Control
from xrl.parallel.groups import ParallelGroups
from xrl.reporter import Listeners, Reporter
from xrl.rewards import InlineJudge, Judge, JudgePool, create_judge
from xrl.rollout.canary import Canary
from xrl.rollout.fleet import Fleet
from xrl.rollout.mismatch import MismatchBounds
from xrl.rollout.publish import WeightStream
from xrl.rollout.publisher import CheckedPublisher, PersistentPublisher, Publisher, WeightPublisher
from xrl.state_saving import StateSaving
from xrl.stopping import Stopping
from xrl.trainer import Hook
from xrl.types import SamplingParams
from xrl.weights.checkpoints import Checkpoints
from xrl.weights.source import WeightSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("xrl")


@dataclass(frozen=True, kw_only=True)
class Lead:
    """What only rank 0 has: prompts, rollout workers behind a collector, and the run's files."""

    prompts: PromptDataset
    sampling: SamplingParams
    fleet: Fleet
    collector: Collector
    stream: WeightStream
    canary: Canary | None
    mismatch: MismatchBounds
    evaluator: Evaluator | None
    journal: Journal
    checkpoints: Checkpoints
    watch: LearningWatch


def build_lead(
    settings: Settings,
    groups: ParallelGroups,
    stack: contextlib.ExitStack,
    ending: HowItEnds | None = None,
    progress: Progress | None = None,
    *,
    judge: Judge | None = None,
) -> Lead:
    """Everything only rank 0 has; `stack` stops it again, whatever happens.

    Args:
        ending: is told of the run's folder.
        progress: advances with what the engines answer and the judge says.
        judge: a function of this process; default: the judge of the settings, behind its bounds.
    """
    data = _load_data(settings)
    folder = _open_run_folder(settings, stack, ending)
    fleet = _claim_workers(settings, groups, folder, stack)
    judges = _open_judge(settings, folder, stack, judge=judge)
    journal = _open_journal(settings, groups, folder, stack, data=data, ending=ending)
    stop_ids = stop_token_ids(settings.model.model, data.tokenizer)
    sampling = _sampling(settings, stop_ids)
    journal.say(f"sampling parameters: {sampling}")
    collector = Collector(fleet, data.tokenizer, judges, progress)
    stream = WeightStream(fleet, device=groups.device)
    stack.callback(stream.close)
    return Lead(
        prompts=data.prompts,
        sampling=sampling,
        fleet=fleet,
        collector=collector,
        stream=stream,
        canary=_canary(settings, fleet, sampling),
        mismatch=MismatchBounds(settings.rollout, dtype=_coarser_dtype(settings)),
        evaluator=_evaluator(settings, collector, data.held_out, sampling),
        journal=journal,
        checkpoints=Checkpoints(folder, settings.run, source=settings.model.model, dtype=train_dtype(settings.model)),
        watch=_watch(settings, folder, has_stop_tokens=bool(stop_ids)),
    )


@dataclass(frozen=True, kw_only=True)
class _LeadData:
    """What the run asks its engines, tokenised and checked."""

    tokenizer: PreTrainedTokenizerBase
    prompts: PromptDataset
    held_out: PromptDataset | None  # prompts of evaluations
    num_rollouts: int  # of the whole run


def _load_data(settings: Settings) -> _LeadData:
    """Before anything is started: it is here that a tokenizer, a chat template or too long prompts are refused."""
    tokenizer = load_tokenizer(settings.model.model)
    prompts = PromptDataset(
        settings.data.data,
        tokenizer,
        max_prompt_length=settings.data.max_prompt_length,
        seed=settings.run.seed,
        shuffle=settings.data.shuffle,
    )
    num_rollouts = rollouts_of(settings, len(prompts))
    held_out = _held_out(settings, tokenizer)
    vocab_size = read_model_shape(settings.model.model).vocab_size
    for dataset in (prompts, held_out):
        if dataset is not None:
            dataset.check_ids(tokenizer, vocab_size=vocab_size)
    return _LeadData(tokenizer=tokenizer, prompts=prompts, held_out=held_out, num_rollouts=num_rollouts)


def _open_run_folder(settings: Settings, stack: contextlib.ExitStack, ending: HowItEnds | None) -> RunFolder:
    """The run's folder, a new one or that of its earlier attempts, with its settings and environment in it."""
    run = settings.run
    if run.run_dir is None:
        folder = RunFolder.create(run.work_dir)
        folder.hold(stack)  # its name, too, may be given as --run-dir
    else:
        folder = RunFolder.open(run.run_dir, stack)
    with contextlib.suppress(OSError):
        folder.stop_request.unlink(missing_ok=True)  # it asked an earlier attempt
    if ending is not None:
        ending.begin(folder)
    logger.info("run folder: %s", folder.path)
    try:
        write_whole(folder.config, dump_settings(absolute_paths(settings)).encode())
        write_environment(folder.environment)
    except NotWritten as error:
        raise SettingsError(str(error)) from error
    return folder


def _claim_workers(settings: Settings, groups: ParallelGroups, folder: RunFolder, stack: contextlib.ExitStack) -> Fleet:
    """The rollout workers of this run, and of no other; ready where they share devices with the actor."""
    fleet = stack.enter_context(start_workers(settings, groups, folder))
    fleet.claim()
    if settings.rollout.colocate:
        fleet.wait_until_ready()  # an engine needs the device for its start, and gives it up then
    return fleet


def _open_judge(
    settings: Settings, folder: RunFolder, stack: contextlib.ExitStack, *, judge: Judge | None
) -> JudgePool:
    judges = create_judge(settings.rewards, log_dir=folder.logs) if judge is None else InlineJudge(judge)
    stack.callback(judges.close)
    return judges


def _open_journal(
    settings: Settings,
    groups: ParallelGroups,
    folder: RunFolder,
    stack: contextlib.ExitStack,
    *,
    data: _LeadData,
    ending: HowItEnds | None,
) -> Journal:
    """The journal, whose first lines say what is trained, where, and by which code."""
    journal = Journal(
        folder,
        tensorboard=settings.run.tensorboard,
        log_interval=settings.run.log_interval,
        num_rollouts=data.num_rollouts,
        ending=ending,
    )
    stack.callback(journal.close)
    for line in start_lines(
        settings,
        world_size=groups.layout.world_size,
        num_prompts=len(data.prompts),
        num_rollouts=data.num_rollouts,
    ):
        journal.say(line)
    for line in layer_lines(
        read_model_shape(settings.model.model),
        dtype=train_dtype(settings.model),
        transformer_impl=settings.model.transformer_impl,
        tensor_size=groups.layout.tensor_size,
    ):
        journal.say(line)
    return journal


def _sampling(settings: Settings, stop_ids: tuple[int, ...]) -> SamplingParams:
    """How answers are sampled.

    Args:
        stop_ids: tokens that end an answer, unless --ignore-eos.
    """
    if not stop_ids and not settings.rollout.ignore_eos:
        logger.warning("%s", no_stop_token(settings.model.model))
    return SamplingParams(
        temperature=settings.rollout.temperature,
        top_k=settings.rollout.top_k,
        top_p=settings.rollout.top_p,
        max_new_tokens=settings.rollout.max_response_length,
        stop_token_ids=() if settings.rollout.ignore_eos else stop_ids,
        seed=settings.run.seed,
    )


def _evaluator(
    settings: Settings, collector: Collector, held_out: PromptDataset | None, sampling: SamplingParams
) -> Evaluator | None:
    if held_out is None:
        return None
    return Evaluator(collector, held_out.all(), settings.evaluation, sampling)


def build_experience(
    settings: Settings,
    groups: ParallelGroups,
    algorithm: Algorithm,
    lead: Lead | None,
    *,
    check_stop: Callable[[], None] = lambda: None,
) -> Experience:
    """Rollouts of the settings' prompts.

    Args:
        check_stop: raises StopAsked where the run is asked to stop.
    """
    source = None
    if lead:
        source = SampledRollouts(
            lead.prompts,
            lead.collector,
            algorithm.score,
            lead.sampling,
            num_samples=settings.data.samples_per_prompt,
            num_in_flight=settings.prompts_in_flight,
            enough=settings.data.rollout_batch_size if settings.rollout.partial_rollout else None,
            most_tokens=settings.rollout.partial_rollout_tokens,
            check_stop=check_stop,
        )
    return Experience(source, Control.of(groups))


def build_turns(settings: Settings, groups: ParallelGroups, actor: Actor, lead: Lead | None) -> DeviceTurns | None:
    """Where actor and engines share devices."""
    if not settings.rollout.colocate:
        return None
    return DeviceTurns(lead.fleet if lead else None, actor.memory, Control.of(groups))


def build_publisher(
    settings: Settings,
    groups: ParallelGroups,
    actor: Actor,
    lead: Lead | None,
    turns: DeviceTurns | None,
    progress: Progress,
) -> Publisher:
    """Publishes, hands devices over, checks, and does so again where all workers were lost."""
    source = WeightSource(
        actor,
        groups,
        transport=settings.rollout.chosen_transport,
        timeout_s=60.0 * settings.parallel.distributed_timeout_minutes,
    )
    publisher: Publisher = WeightPublisher(source, lead.stream if lead else None, progress)
    if turns is not None:
        publisher = TurnTakingPublisher(publisher, turns)
    if settings.rollout.canary_tokens:
        publisher = CheckedPublisher(publisher, actor, lead.canary if lead else None)
    return PersistentPublisher(
        publisher,
        lead.fleet if lead else None,
        Control.of(groups),
        max_repeats=settings.rollout.rollout_max_restarts,
    )


def build_reporter(settings: Settings, groups: ParallelGroups, actor: Actor, lead: Lead | None) -> Reporter:
    """What is told of each step."""
    listeners = None
    if lead:
        listeners = Listeners(
            journal=lead.journal,
            watch=lead.watch,
            mismatch=lead.mismatch,
            records_samples=settings.run.record_samples,
            takes_norm=settings.optimizer.clip_grad > 0,
            sees_every_change=actor.dtype == torch.float32,
        )
    return Reporter(listeners, groups.control)


def build_hooks(
    settings: Settings,
    groups: ParallelGroups,
    actor: Actor,
    lead: Lead | None,
    progress: Progress,
    state_saving: StateSaving,
    *,
    own: Sequence[Hook] = (),
) -> list[Hook]:
    """Checkpoints, evaluation, saved states, and the end of a run that learns nothing.

    Args:
        own: hooks of a user's: what they change is in the state.
    """
    control = Control.of(groups)
    keeper = Keeper(journal=lead.journal, checkpoints=lead.checkpoints, watch=lead.watch) if lead else None
    evaluator, journal = (lead.evaluator, lead.journal) if lead else (None, None)
    return [
        Checkpointing(actor, keeper, control, progress),
        Evaluation(evaluator, journal, control, interval=settings.evaluation.eval_interval),
        *own,
        state_saving,  # behind the evaluation, which then does not run again when the run goes on from here
        Ending(keeper, control),
    ]


def build_stopping(
    settings: Settings,
    groups: ParallelGroups,
    lead: Lead | None,
    stop: StopRequest,
    state_saving: StateSaving,
    *,
    first_step: int,
) -> Stopping:
    """What ends a run that is asked to stop: every rank hears of signals, rank 0 looks for file and time.

    Raises:
        SettingsError: Slurm's variable for the start of the job holds no time.
    """
    if lead:
        stop.watch_file(lead.journal.folder.stop_request)
        if settings.run.exit_before is not None:
            start = job_start(os.environ, psutil.Process().create_time())
            limit = TimeLimit(flag=settings.run.exit_before, seconds=settings.run.exit_before_s, start=start)
            stop.watch_time(limit)
    journal = lead.journal if lead else None
    return Stopping(stop, journal, Control.of(groups), state_saving, first_step=first_step)


def start_workers(settings: Settings, groups: ParallelGroups, folder: RunFolder) -> Fleet:
    """The rollout workers of this run, starting."""
    config = settings.rollout
    on_cuda = groups.device.type == "cuda"
    num_workers = config.rollout_num_workers or (torch.cuda.device_count() if on_cuda else 1)
    devices = [f"cuda:{number % torch.cuda.device_count()}" if on_cuda else "cpu" for number in range(num_workers)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Fleet(
        config,
        model_dir=settings.model.model,
        dtype=_dtypes(settings)[1],
        devices=devices,
        num_threads=config.rollout_num_threads or max(1, cores // num_workers),
        max_model_len=_max_model_len(settings),
        log_dir=folder.logs,
    )


def _watch(settings: Settings, folder: RunFolder, *, has_stop_tokens: bool) -> LearningWatch:
    words = LearningWords(
        judge=settings.rewards.judge,
        max_response_length=settings.rollout.max_response_length,
        ignore_eos=settings.rollout.ignore_eos,
        has_stop_tokens=has_stop_tokens,
        trajectory=folder.trajectory,
    )
    return LearningWatch(words, stops=settings.run.on_nothing_learned == "stop")


def _canary(settings: Settings, fleet: Fleet, sampling: SamplingParams) -> Canary | None:
    if not settings.rollout.canary_tokens:
        return None
    return Canary(
        fleet,
        settings.rollout,
        dtype=_coarser_dtype(settings),
        vocab_size=read_model_shape(settings.model.model).vocab_size,
        max_model_len=_max_model_len(settings),
        sampling=sampling,
    )


def _dtypes(settings: Settings) -> tuple[str, str]:
    """Number formats of the actor's weights and of the engines'."""
    dtype = str(train_dtype(settings.model)).removeprefix("torch.")
    return dtype, dtype if settings.rollout.rollout_dtype == "auto" else settings.rollout.rollout_dtype


def _coarser_dtype(settings: Settings) -> str:
    """What actor and engines agree to, at best."""
    return "float32" if set(_dtypes(settings)) == {"float32"} else "bfloat16"


def _max_model_len(settings: Settings) -> int:
    """Longest prompt + response that an engine is asked for, in tokens."""
    longest = settings.data.max_prompt_length + settings.rollout.max_response_length
    return min(read_model_shape(settings.model.model).max_positions, longest)


def share_rollout_count(lead: Lead | None, groups: ParallelGroups) -> int:
    """Tell every rank how many rollouts the run has. Collective."""
    count = torch.tensor([lead.journal.num_rollouts if lead else 0])
    dist.broadcast(count, group_src=0, group=groups.control)
    return int(count.item())


def _held_out(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PromptDataset | None:
    """The prompts of evaluations, where they are asked for."""
    if settings.evaluation.eval_data is None:
        return None
    return PromptDataset(
        settings.evaluation.eval_data,
        tokenizer,
        max_prompt_length=settings.data.max_prompt_length,
        seed=settings.run.seed,
        shuffle=False,
    )
