"""GRPO steps of TRL's GRPOTrainer on CPU: the rival in `grpo_step.py`, in a process of its own.

TRL gets its best settings here: fp32 without activation recompute, no reference model, one update a generation batch
(so no pass for old log-probs), the whole batch generated at once, logits of the completions only. On 2 cores
micro-batches of 16, 32 and 64, a dynamic and a static cache, and torch.compile took the same time within a few
percent; the defaults are those that take the least memory (the flags try others). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
import trl
from datasets import Dataset
from distinct_letters import distinct_letters
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer


class StepClock(TrainerCallback):
    """Wall and CPU seconds of each optimizer step, sampling included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        self.cpu_seconds.append(time.process_time() - self._cpu_start)


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that times its generation."""

    generation_seconds: list[float]
    completion_tokens: list[int]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        completion_ids, *rest = super()._generate_single_turn(*args, **kwargs)
        self.generation_seconds.append(time.perf_counter() - start)
        self.completion_tokens.append(sum(map(len, completion_ids)))
        return completion_ids, *rest


def letters_reward(completions: list[list[dict[str, str]]], **_: Any) -> list[float | None]:
    """Rewards of TRL's chat completions."""
    return [distinct_letters(completion[0]["content"]) for completion in completions]


def build_trainer(options: argparse.Namespace, clock: StepClock, output_dir: str) -> TimedTrainer:
    """A trainer that takes the prompts in file order, --prompts-per-step of them a step."""
    lines = options.prompts.read_text(encoding="utf-8").splitlines()
    dataset = Dataset.from_list([{"prompt": json.loads(line)["prompt"]} for line in lines])
    num_samples = options.prompts_per_step * options.samples_per_prompt
    config = GRPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=num_samples // options.micro_batch_size,
        num_generations=options.samples_per_prompt,
        max_completion_length=options.new_tokens,
        generation_kwargs={"min_new_tokens": options.new_tokens},
        cache_implementation=None if options.cache == "dynamic" else options.cache,
        shuffle_dataset=False,
        max_steps=options.warmup_steps + options.steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        torch_compile=options.compile,
        seed=options.seed,
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    trainer = TimedTrainer(
        model=model,
        reward_funcs=letters_reward,
        args=config,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
        callbacks=[clock],
    )
    trainer.generation_seconds, trainer.completion_tokens = [], []
    return trainer


def main() -> None:
    """Run the steps and print their seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--prompts", type=Path, required=True, help="prompt rows, JSONL")
    parser.add_argument("--steps", type=int, default=2, help="steps that count")
    parser.add_argument("--warmup-steps", type=int, default=1, help="steps before them that do not")
    parser.add_argument("--prompts-per-step", type=int, default=32)
    parser.add_argument("--samples-per-prompt", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--cache", default="dynamic", choices=("dynamic", "static"))
    parser.add_argument("--compile", action="store_true", help="let TRL torch.compile the model")
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(options.num_threads)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = build_trainer(options, clock, output_dir)
        trainer.train()
    counted = slice(options.warmup_steps, None)
    report = {
        "library": f"trl {trl.__version__}",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "micro_batch_size": options.micro_batch_size,
        "cache": options.cache,
        "step_seconds": clock.seconds[counted],
        "step_cpu_seconds": clock.cpu_seconds[counted],
        "generation_seconds": trainer.generation_seconds[counted],
        "completion_tokens": trainer.completion_tokens[counted],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
