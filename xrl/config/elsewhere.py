"""Words of other projects: what their users would write, and what does the same here.

A row a word, without its dashes. `a.b` is tried before `b`, so that a word may mean one thing below `a` and another
elsewhere. An answer that begins with a flag is what the setting is called here; any other says why there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_RESUME = "--resume, with --run-dir and --state-interval"
_NO_TRACKER = "there is none: metrics go to metrics.jsonl and, with --tensorboard, to TensorBoard events in the run"
_MICRO_BATCH = "--max-tokens-per-microbatch (tokens, packed) or --micro-batch-size (samples, padded)"
_UPDATE_BATCH = "--rollout-batch-size (prompts) times --samples-per-prompt, over --updates-per-rollout"
_ACCUMULATION = "there is none: it follows from the samples of an update and --max-tokens-per-microbatch"
_ENGINE_MEMORY = (
    "there is none: --rollout-kv-cache-gb bounds the embedded engine; TurboMind takes 80% of the memory that is free"
)
_ENGINE_LAYOUT = "there is none: an engine runs on one device; --rollout-num-workers says how many there are"
_WHAT_IS_LEFT = "there is none: the data-parallel size is the ranks over tensor x pipeline"
_RANKS = "a flag of `xrl train` and of torchrun: --nproc-per-node N, before the settings"
_ONE_HOST = "there is none: all ranks run on one host; workers may run on others (--rollout-worker-urls)"
_NO_VLLM = "there is none: --engine takes embedded or turbomind"
_NO_LORA = "there is none: all weights are trained"
_NO_CRITIC = "there is none: GRPO compares an answer with its group and needs no critic"
_CHAT = "the tokenizer's own chat template is used: put yours into the model's folder (chat_template.jinja)"
_REWARD = "--judge (a name, or path/file.py:function)"
_ROW_KEYS = "there is none: a row's keys are prompt and reward_model.ground_truth (or ground_truth)"
_TRAINED_ONCE = "there is none: each answer is trained on once; --updates-per-rollout deals them out to updates"
_GROUP = "--samples-per-prompt"
_LENGTH = "--max-response-length"
_TOTAL_LENGTH = "--max-prompt-length and --max-response-length"
_PARTIAL = "--partial-rollout, with --oversampling"

# Megatron-LM, torchrun, transformers, TRL, verl, slime and miles, OpenRLHF, NeMo-RL and prime-rl.
ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        # Where a run starts, and what it leaves.
        "resume_from": _RESUME,
        "resume_from_checkpoint": _RESUME,
        "resume_mode": _RESUME,
        "load": "--model",
        "model.path": "--model",
        "model.name": "--model",
        "model_name": "--model",
        "model_name_or_path": "--model",
        "pretrain": "--model",
        "hf_checkpoint": "--model",
        "ref_load": "there is none: the reference is the model that the run starts from, with --kl-coef above 0",
        "tokenizer": "there is none: the tokenizer is the one in the folder of --model",
        "trust_remote_code": "there is none: no code of a checkpoint is run",
        "save": "--work-dir",
        "save_dir": "--work-dir",
        "output_dir": "--work-dir",
        "default_local_dir": "--work-dir",
        "save_steps": "--save-interval (rollouts)",
        "exit_duration_in_mins": "--exit-before (55m, say)",
        "exit_signal_handler": "there is none: a run always stops by SIGTERM, SIGUSR1, SIGUSR2 or the file stop",
        "save_freq": "--save-interval (rollouts)",
        "save_total_limit": "--save-keep",
        "max_actor_ckpt_to_keep": "--save-keep",
        # What it says of itself.
        "wandb": _NO_TRACKER,
        "use_wandb": _NO_TRACKER,
        "wandb_project": _NO_TRACKER,
        "wandb_run_name": _NO_TRACKER,
        "report_to": _NO_TRACKER,
        "trainer.logger": _NO_TRACKER,
        "run_name": "--run-dir; else each run makes a folder of its own in --work-dir, named by the time it starts",
        "logging_steps": "--log-interval (rollouts)",
        "log_completions": "there is none: every answer is in rollout_idx_<n>_trajectory.jsonl of the run",
        "eval_steps": "--eval-interval (rollouts)",
        "test_freq": "--eval-interval (rollouts)",
        "val_before_train": "there is none: --eval-data is always evaluated before and after",
        # Data.
        "data_path": "--data",
        "dataset": "--data (a JSONL or parquet file)",
        "dataset_name": "--data (a JSONL or parquet file)",
        "dataset_path": "--data (a JSONL or parquet file)",
        "train_data": "--data",
        "train_files": "--data (one file)",
        "prompt_data": "--data",
        "val_data": "--eval-data",
        "val_files": "--eval-data (one file)",
        "prompt_key": _ROW_KEYS,
        "apply_chat_template": _CHAT,
        "chat_template": _CHAT,
        "random_seed": "--seed",
        "rollout_seed": "--seed",
        # How long, and how much at once.
        "train_iters": "--num-rollouts, or --num-epochs",
        "max_steps": "--num-rollouts",
        "num_rollout": "--num-rollouts",
        "total_training_steps": "--num-rollouts",
        "num_train_epochs": "--num-epochs",
        "total_epochs": "--num-epochs",
        "num_epoch": "--num-epochs",
        "num_episodes": "--num-epochs",
        "data.train_batch_size": "--rollout-batch-size (prompts)",
        "gen_batch_size": "--rollout-batch-size (prompts)",
        "num_prompts_per_step": "--rollout-batch-size (prompts)",
        "global_batch_size": _UPDATE_BATCH,
        "train_global_batch_size": _UPDATE_BATCH,
        "train_batch_size": _UPDATE_BATCH,
        "ppo_mini_batch_size": _UPDATE_BATCH,
        "num_steps_per_rollout": "--updates-per-rollout",
        "steps_per_generation": "--updates-per-rollout (steps_per_generation over gradient_accumulation_steps)",
        "ppo_epochs": _TRAINED_ONCE,
        "num_iterations": _TRAINED_ONCE,
        "per_device_train_batch_size": _MICRO_BATCH,
        "train_micro_batch_size": _MICRO_BATCH,
        "ppo_micro_batch_size_per_gpu": _MICRO_BATCH,
        "micro_train_batch_size": _MICRO_BATCH,
        "ppo_max_token_len_per_gpu": "--max-tokens-per-microbatch",
        "max_tokens_per_gpu": "--max-tokens-per-microbatch",
        "use_dynamic_bsz": "--max-tokens-per-microbatch: samples are packed up to it",
        "gradient_accumulation_steps": _ACCUMULATION,
        "seq_length": _TOTAL_LENGTH,
        "max_length": _TOTAL_LENGTH,
        "max_model_len": _TOTAL_LENGTH,
        "prompt_max_len": "--max-prompt-length",
        # Sampling.
        "num_generations": _GROUP,
        "num_generations_per_prompt": _GROUP,
        "n_samples_per_prompt": _GROUP,
        "rollouts_per_example": _GROUP,
        "group_size": _GROUP,
        "rollout.n": _GROUP,
        "n_samples_per_eval_prompt": "--eval-samples-per-prompt",
        "max_completion_length": _LENGTH,
        "max_new_tokens": _LENGTH,
        "max_tokens": _LENGTH,
        "response_length": _LENGTH,
        "rollout_max_response_len": _LENGTH,
        "generate_max_len": _LENGTH,
        "rollout_temperature": "--temperature",
        "rollout_top_p": "--top-p",
        "repetition_penalty": "there is none: the actor scores the distribution that answers are drawn from",
        "over_sampling_batch_size": _PARTIAL,
        "dynamic_sampling_filter_path": "--filter-zero-variance: groups whose rewards are all equal are left out",
        "filter_groups.enable": "--filter-zero-variance: groups whose rewards are all equal are left out",
        # Rewards.
        "reward_funcs": _REWARD,
        "reward_model": _REWARD,
        "reward_model_path": "there is none: answers are judged by a function, --judge path/file.py:function",
        "remote_rm_url": "there is none: answers are judged by a function, --judge path/file.py:function",
        "custom_reward_function.path": "--judge path/file.py:function",
        "rm_type": _REWARD,
        "custom_rm_path": "--judge path/file.py:function",
        # The loss.
        "adv_estimator": "--algorithm",
        "loss_type": "--loss-aggregation",
        "loss_agg_mode": "--loss-aggregation",
        "scale_rewards": "--normalize-advantages",
        "norm_adv_by_std_in_grpo": "--normalize-advantages",
        "disable_grpo_std_normalization": "--normalize-advantages, off by --no-normalize-advantages",
        "beta": "--kl-coef",
        "kl_loss_coef": "--kl-coef",
        "use_kl_loss": "--kl-coef (above 0 the loss has a KL term)",
        "kl_ctrl.kl_coef": "there is none: the KL is a term of the loss, --kl-coef",
        "use_kl_in_reward": "there is none: the KL is a term of the loss, --kl-coef",
        "kl_loss_type": "--kl-type",
        "kl_penalty": "--kl-type",
        "epsilon": "--clip-low and --clip-high",
        "eps_clip": "--clip-low and --clip-high",
        "clip_ratio": "--clip-low and --clip-high",
        "epsilon_low": "--clip-low",
        "epsilon_high": "--clip-high",
        "eps_clip_high": "--clip-high",
        "clip_ratio_c": "--dual-clip",
        "entropy_coeff": "--entropy-coef",
        "use_tis": "--importance-correction truncate",
        "vllm_importance_sampling_correction": "--importance-correction truncate",
        "gae_lambda": _NO_CRITIC,
        # The optimizer.
        "learning_rate": "--lr",
        "lr_scheduler": "--lr-decay-style",
        "lr_scheduler_type": "--lr-decay-style",
        "warmup_steps": "--lr-warmup-iters (updates)",
        "warmup_ratio": "--lr-warmup-iters (updates, not a share of them)",
        "max_grad_norm": "--clip-grad",
        "adam_epsilon": "--adam-eps",
        # How the model is computed.
        "use_peft": _NO_LORA,
        "lora_rank": _NO_LORA,
        "lora_alpha": _NO_LORA,
        "load_in_4bit": _NO_LORA,
        "fp16": "--bf16; there is no fp16",
        "dtype": "--bf16 for the actor, --rollout-dtype for the engine",
        "precision": "--bf16 for the actor, --rollout-dtype for the engine",
        "attn_implementation": "--transformer-impl",
        "gradient_checkpointing": "--recompute-granularity full",
        "use_liger_kernel": "--fused-linear-logprob",
        # Layout.
        "tp": "--tensor-model-parallel-size",
        "tensor_parallel_size": "--tensor-model-parallel-size",
        "pp": "--pipeline-model-parallel-size",
        "pipeline_parallel_size": "--pipeline-model-parallel-size",
        "ep": "--expert-model-parallel-size",
        "expert_parallel_size": "--expert-model-parallel-size",
        "cp": "--context-parallel-size (only 1 so far)",
        "ulysses_sequence_parallel_size": "--context-parallel-size (only 1 so far)",
        "dp": _WHAT_IS_LEFT,
        "dp_size": _WHAT_IS_LEFT,
        "data_parallel_size": _WHAT_IS_LEFT,
        "num_layers_per_virtual_pipeline_stage": "there is none: the pipeline has no interleaved stages",
        "deepspeed": "there is none: --use-distributed-optimizer shards the optimizer's state",
        "fsdp": "there is none: --use-distributed-optimizer shards the optimizer's state",
        "nproc_per_node": _RANKS,
        "nproc": _RANKS,
        "num_ranks": _RANKS,
        "num_gpus": _RANKS,
        "n_gpus_per_node": _RANKS,
        "gpus_per_node": _RANKS,
        "num_processes": _RANKS,
        "nnodes": _ONE_HOST,
        "num_nodes": _ONE_HOST,
        "master_addr": _ONE_HOST,
        # Engines.
        "use_vllm": _NO_VLLM,
        "vllm_mode": "--colocate (engine and actor on the same devices); else each has devices of its own",
        "vllm_server_base_url": "--rollout-worker-urls",
        "rollout.name": "--engine",
        "vllm_num_engines": "--rollout-num-workers",
        "rollout_num_gpus": "--rollout-num-workers (one device each)",
        "colocate_all_models": "--colocate",
        "vllm_enable_sleep_mode": "--colocate",
        "gpu_memory_utilization": _ENGINE_MEMORY,
        "vllm_gpu_memory_utilization": _ENGINE_MEMORY,
        "sglang_mem_fraction_static": _ENGINE_MEMORY,
        "rollout.tensor_model_parallel_size": _ENGINE_LAYOUT,
        "vllm_tensor_parallel_size": _ENGINE_LAYOUT,
        "rollout_num_gpus_per_engine": _ENGINE_LAYOUT,
        "max_num_seqs": "--rollout-max-batch-size",
        "ddp_timeout": "--distributed-timeout-minutes",
    }
)


def translation(name: str) -> str | None:
    """What does here what `name` does in another project, as the end of a sentence; None for words that nobody uses.

    Args:
        name: with underscores; dots where it was nested, as in `actor_rollout_ref.rollout.n`.
    """
    parts = name.lower().replace("-", "_").split(".")
    for start in range(len(parts)):
        answer = ELSEWHERE.get(".".join(parts[start:]))
        if answer is not None:
            return f"here it is {answer}" if answer.startswith("--") else answer
    return None
