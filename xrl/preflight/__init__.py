"""Everything that can be wrong with a run, checked in about a second, without torch, before anything starts.

What needs the libraries that load the tokenizer, and an algorithm of the user's own, are tried out in processes of
their own meanwhile (xrl/data/trial.py, xrl/algorithms/trial.py).

model.py       config.json: what the decoder is, and whether we compute its maths
weights.py     safetensors files: there, whole, and with every tensor the model needs
tokenizer.py   tokenizer files, and whether the model has their ids
data.py        rows of the data files, and whether the judge can use their ground truths
layout.py      ranks and how the model is cut over them
machine.py     packages and hardware that were asked for by name
processes.py   no more processes and threads than the machine can run
resume.py      the run's folder, and the saved state that it goes on from
disk.py        room for the checkpoints that will be written
workers.py     rollout workers that somebody started: their key, and who has them
"""

from __future__ import annotations

import contextlib

from xrl.algorithms import check_algorithm
from xrl.algorithms.own import is_own
from xrl.algorithms.trial import AlgorithmTrial
from xrl.config import Settings, SettingsError
from xrl.config.errors import unreadable_files_refused
from xrl.data.prompts import rollouts_of
from xrl.data.trial import Question, Trial
from xrl.metrics.run_folder import check_writable, remove_leftovers_of_runs
from xrl.models.shape import ModelShape
from xrl.preflight.data import check_data
from xrl.preflight.disk import check_disk
from xrl.preflight.layout import check_layout
from xrl.preflight.machine import check_machine
from xrl.preflight.model import check_model
from xrl.preflight.processes import check_processes
from xrl.preflight.resume import check_resume
from xrl.preflight.tokenizer import check_tokenizer
from xrl.preflight.weights import check_weights
from xrl.preflight.workers import check_workers
from xrl.rewards import check_judge
from xrl.rollout import check_engine
from xrl.rollout.embedded import bytes_per_block, least_blocks, missing_part

__all__ = ["preflight"]


@unreadable_files_refused()
def preflight(settings: Settings, *, world_size: int, tries_out: bool = True) -> None:
    """Refuse settings that cannot work; only the work folder is touched, and last.

    Args:
        world_size: ranks of the run.
        tries_out: load the tokenizer, tokenise the prompts and build a user's algorithm, as ranks will; once is enough.

    Raises:
        SettingsError: one sentence: what, where, what was found, what is needed.
    """
    _check_names(settings)
    check_processes(settings, world_size=world_size)
    folder = settings.model.model
    shape = check_model(folder)
    _check_lengths(settings, shape)
    check_layout(settings.parallel, shape, world_size=world_size)
    _check_prompt_sharing(settings)
    _check_layers(settings, shape)
    check_machine(settings)
    check_workers(settings.rollout)
    with contextlib.ExitStack() as stack:
        trial = stack.enter_context(Trial(_question(settings, shape))) if tries_out else None
        is_tried = tries_out and is_own(settings.algorithm)
        algorithm = stack.enter_context(AlgorithmTrial(settings.algorithm)) if is_tried else None
        check_tokenizer(folder, vocab_size=shape.vocab_size)
        check_weights(folder, shape)
        num_rows = check_data(settings)
        if algorithm is not None:
            algorithm.finish()
        num_prompts = trial.num_prompts() if trial is not None else None
    if num_prompts is not None:
        rollouts_of(settings, num_prompts)
    check_resume(settings, shape)
    remove_leftovers_of_runs(settings.run.work_dir)
    check_disk(settings, shape, num_rows=num_rows)
    if settings.run.run_dir is None:
        check_writable(settings.run.work_dir)


def _question(settings: Settings, shape: ModelShape) -> Question:
    eval_data = settings.evaluation.eval_data
    return Question(
        model=str(settings.model.model),
        vocab_size=shape.vocab_size,
        data=str(settings.data.data),
        eval_data=None if eval_data is None else str(eval_data),
        max_prompt_length=settings.data.max_prompt_length,
    )


def _check_names(settings: Settings) -> None:
    check_engine(settings.rollout.engine)
    check_algorithm(settings.algorithm)
    check_judge(settings.rewards.judge)


def _check_lengths(settings: Settings, shape: ModelShape) -> None:
    prompt, response = settings.data.max_prompt_length, settings.rollout.max_response_length
    if prompt + response > shape.max_positions:
        raise SettingsError(
            f"--max-prompt-length {prompt} + --max-response-length {response} = {prompt + response} is more than the "
            f"{shape.max_positions} positions of the model (max_position_embeddings, or sliding_window, in "
            f"{settings.model.model / 'config.json'})"
        )
    cache_gb = settings.rollout.rollout_kv_cache_gb
    # Where the number format is not said, it may be the smaller one: the workers know.
    is_fp32 = {"float32": True, "bfloat16": False, "auto": settings.model.bf16 is False}[settings.rollout.rollout_dtype]
    itemsize = 4 if is_fp32 else 2
    needed = least_blocks(prompt + response) * bytes_per_block(shape, itemsize)
    if cache_gb is not None and cache_gb * 1e9 < needed:
        raise SettingsError(
            f"--rollout-kv-cache-gb {cache_gb:g} does not hold the keys and values of one sequence of "
            f"{prompt + response} tokens, which take {needed / 1e9:.3g} GB"
        )


def _check_layers(settings: Settings, shape: ModelShape) -> None:
    missing = missing_part(shape) if settings.rollout.engine == "embedded" else None
    if missing is not None:
        raise SettingsError(f"--engine embedded does not run {missing}: use another engine")
    if shape.latent is not None and settings.model.transformer_impl == "transformer_engine":
        raise SettingsError(
            f"--transformer-impl transformer_engine: the latent attention of {shape.architecture} is computed by our "
            f"own layers only: use --transformer-impl local"
        )


def _check_prompt_sharing(settings: Settings) -> None:
    if not settings.data.share_prompt_prefix:
        return
    if settings.data.micro_batch_size is not None:
        raise SettingsError(
            f"--share-prompt-prefix needs packed samples, but --micro-batch-size {settings.data.micro_batch_size} pads "
            f"them: leave one of the two out"
        )
    if settings.model.transformer_impl == "transformer_engine":
        raise SettingsError(
            "--share-prompt-prefix needs our own layers, but --transformer-impl is transformer_engine: "
            "leave one of the two out"
        )
