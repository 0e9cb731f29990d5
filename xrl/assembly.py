"""Puts rank 0's part of a run together: run folder, prompts, judge, rollout workers."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from xrl.config import Settings, SettingsError
from xrl.config.parse import dump_settings
from xrl.config.paths import absolute_paths
from xrl.data.prompts import PromptDataset, rollouts_of
from xrl.data.tokenizer import load_tokenizer, stop_token_ids
from xrl.files.disk import NotWritten
from xrl.files.whole import write_whole
from xrl.launch.progress import Progress
from xrl.metrics.ending import Ending
from xrl.metrics.environment import write_environment
from xrl.metrics.journal import Journal
from xrl.metrics.learning import LearningWatch
from xrl.metrics.learning_words import LearningWords, no_stop_token
from xrl.metrics.report import start_lines
from xrl.metrics.run_folder import RunFolder
from xrl.models.build import train_dtype
from xrl.models.choice import layer_lines
from xrl.models.shape import read_model_shape
from xrl.parallel.groups import ParallelGroups
from xrl.rewards import create_judge
from xrl.rollout.canary import Canary
from xrl.rollout.collect import Collector
from xrl.rollout.evaluate import Evaluator
from xrl.rollout.mismatch import MismatchBounds
from xrl.rollout.pool import WorkerPool
from xrl.rollout.publish import Publisher
from xrl.trainer import Lead
from xrl.types import SamplingParams
from xrl.weights.checkpoints import Checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("xrl")


def build_lead(
    settings: Settings,
    groups: ParallelGroups,
    stack: contextlib.ExitStack,
    ending: Ending | None = None,
    progress: Progress | None = None,
) -> Lead:
    """Everything only rank 0 has; `stack` stops it again, whatever happens.

    Args:
        ending: is told of the run's folder.
        progress: advances with what the engines answer and the judge says.
    """
    # Before anything is started: it is here that a tokenizer, a chat template or too long prompts are refused.
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

    folder = RunFolder.create(settings.run.work_dir)
    if ending is not None:
        ending.begin(folder)
    logger.info("run folder: %s", folder.path)
    try:
        write_whole(folder.config, dump_settings(absolute_paths(settings)).encode())
        write_environment(folder.environment)
    except NotWritten as error:
        raise SettingsError(str(error)) from error
    pool = stack.enter_context(start_workers(settings, groups, folder))
    pool.claim()
    if settings.rollout.colocate:
        pool.wait_until_ready()  # an engine needs the device for its start, and gives it up then
    judge = create_judge(settings.rewards, log_dir=folder.logs)
    stack.callback(judge.close)
    journal = Journal(
        folder,
        tensorboard=settings.run.tensorboard,
        log_interval=settings.run.log_interval,
        num_rollouts=num_rollouts,
        ending=ending,
    )
    stack.callback(journal.close)
    for line in start_lines(
        settings, world_size=groups.layout.world_size, num_prompts=len(prompts), num_rollouts=num_rollouts
    ):
        journal.say(line)
    for line in layer_lines(
        read_model_shape(settings.model.model),
        dtype=train_dtype(settings.model),
        transformer_impl=settings.model.transformer_impl,
        tensor_size=groups.layout.tensor_size,
    ):
        journal.say(line)

    stop_ids = stop_token_ids(settings.model.model, tokenizer)
    if not stop_ids and not settings.rollout.ignore_eos:
        logger.warning("%s", no_stop_token(settings.model.model))
    sampling = SamplingParams(
        temperature=settings.rollout.temperature,
        top_k=settings.rollout.top_k,
        top_p=settings.rollout.top_p,
        max_new_tokens=settings.rollout.max_response_length,
        stop_token_ids=() if settings.rollout.ignore_eos else stop_ids,
        seed=settings.run.seed,
    )
    journal.say(f"sampling parameters: {sampling}")
    collector = Collector(pool, tokenizer, judge, progress)
    publisher = Publisher(pool, device=groups.device)
    stack.callback(publisher.close)
    return Lead(
        prompts=prompts,
        sampling=sampling,
        collector=collector,
        publisher=publisher,
        canary=_canary(settings, pool, sampling),
        mismatch=MismatchBounds(settings.rollout, dtype=_coarser_dtype(settings)),
        evaluator=None if held_out is None else Evaluator(collector, held_out.all(), settings.evaluation, sampling),
        journal=journal,
        checkpoints=Checkpoints(folder, settings.run, source=settings.model.model, dtype=train_dtype(settings.model)),
        watch=_watch(settings, folder, has_stop_tokens=bool(stop_ids)),
    )


def start_workers(settings: Settings, groups: ParallelGroups, folder: RunFolder) -> WorkerPool:
    """The rollout workers of this run, starting."""
    config = settings.rollout
    on_cuda = groups.device.type == "cuda"
    num_workers = config.rollout_num_workers or (torch.cuda.device_count() if on_cuda else 1)
    devices = [f"cuda:{number % torch.cuda.device_count()}" if on_cuda else "cpu" for number in range(num_workers)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return WorkerPool(
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


def _canary(settings: Settings, pool: WorkerPool, sampling: SamplingParams) -> Canary | None:
    if not settings.rollout.canary_tokens:
        return None
    return Canary(
        pool,
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
