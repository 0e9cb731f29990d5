"""Remake the demo's student and its data: `python examples/make_student.py` (about a minute on a laptop CPU).

The student is a Qwen3 of 0.85M parameters with a tokenizer of its own. It is trained from scratch, supervised, on
worked problems, and stopped while it still gets about half of them wrong: the rest is left to GRPO. Warm-up, training
and evaluation problems are three disjoint sets.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from arithmetic_problems import Problem, make_problems, to_row
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from xrl.data.gsm8k import INSTRUCTION

HERE = Path(__file__).resolve().parent

NUM_TRAIN, NUM_EVAL, NUM_PROBE, NUM_WARMUP = 2560, 256, 256, 20_000
VOCAB_SIZE = 512  # of the model; a multiple of every tensor-parallel size up to 8
BATCH_SIZE = 64
PEAK_LR = 2e-3
LR_WARMUP_STEPS = 50
MAX_STEPS = 900
PROBE_INTERVAL = 10
MAX_NEW_TOKENS = 32

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(problems: Sequence[Problem]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits: small, yet able to write any text."""
    bpe = Tokenizer(models.BPE())
    words = Regex(r"\d| ?[^\s\d\w]+| ?[^\W\d]+|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"user\n{problem.question} {INSTRUCTION}\nassistant\n{problem.answer}" for problem in problems)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 with fresh weights, about 0.85M of them."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def encode_prompt(problem: Problem, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The question as the chat template writes it, ready for an answer."""
    messages = to_row(problem, split="", index=0)["prompt"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text)


def answer_loss(model: Qwen3ForCausalLM, prompts: list[list[int]], answers: list[list[int]], pad_id: int) -> Tensor:
    """Mean cross-entropy of the answers' tokens, the prompts' left out."""
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    ids = torch.full((len(rows), max(map(len, rows))), pad_id)
    is_answer = torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        is_answer[i, len(prompt) : len(row)] = True
    # Padding stands on the right, so the causal mask alone keeps it out of sight.
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    targets = is_answer[:, 1:]
    return F.cross_entropy(model.lm_head(hidden[targets]), ids[:, 1:][targets])


@torch.no_grad()
def pass_rate(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], *, greedy: bool = False
) -> float:
    """Share of the problems whose answer, sampled at temperature 1, ends in the right number."""
    prompts = [encode_prompt(problem, tokenizer) for problem in problems]
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    ids = model.generate(**batch, do_sample=not greedy, max_new_tokens=MAX_NEW_TOKENS)  # type: ignore[misc, unused-ignore]
    answers = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    found = (re.findall(r"####\s*(-?\d+)", answer) for answer in answers)
    right = sum(numbers[-1:] == [problem.ground_truth] for numbers, problem in zip(found, problems, strict=True))
    return right / len(problems)


def warm_up(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    probe: Sequence[Problem],
    target: float,
) -> None:
    """Train on worked answers until the sampled pass rate on `probe` reaches `target`."""
    prompts = [encode_prompt(problem, tokenizer) for problem in problems]
    answers = [tokenizer.encode(problem.answer + TURN_END) for problem in problems]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    started = time.perf_counter()
    for step in range(1, MAX_STEPS + 1):
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * step / MAX_STEPS))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1.0, step / LR_WARMUP_STEPS) * decay
        rows = [(step * BATCH_SIZE + i) % len(problems) for i in range(BATCH_SIZE)]
        loss = answer_loss(model, [prompts[i] for i in rows], [answers[i] for i in rows], tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % PROBE_INTERVAL == 0 or step == MAX_STEPS:
            rate = pass_rate(model, tokenizer, probe)
            print(
                f"step {step:4d}  loss {loss.item():.3f}  pass rate {rate:.2f}  {time.perf_counter() - started:.0f} s"
            )
            if rate >= target:
                return


def write_rows(problems: Sequence[Problem], path: Path, split: str) -> None:
    """Write problems as training rows, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(to_row(problem, split=split, index=i)) + "\n" for i, problem in enumerate(problems))
    path.write_text("".join(lines), encoding="utf-8")


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the tokenizer under the class name that every release of transformers knows."""
    tokenizer.save_pretrained(folder)
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Write the data, train the student, save it as a Hugging Face folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "student", help="Hugging Face folder to write")
    parser.add_argument("--data-dir", type=Path, default=HERE / "data", help="folder for train.jsonl and eval.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the warm-up problems")
    parser.add_argument("--target-pass-rate", type=float, default=0.45, help="stop when sampled answers are this good")
    options = parser.parse_args()

    disable_progress_bar()
    torch.manual_seed(options.seed)
    evaluation = make_problems(NUM_EVAL, seed=10_001)
    train = make_problems(NUM_TRAIN, seed=10_002, exclude=evaluation)
    write_rows(evaluation, options.data_dir / "eval.jsonl", "test")
    write_rows(train, options.data_dir / "train.jsonl", "train")
    own = make_problems(NUM_PROBE + NUM_WARMUP, seed=options.seed, exclude=[*evaluation, *train])
    probe, warmup = own[:NUM_PROBE], own[NUM_PROBE:]

    tokenizer = train_tokenizer(warmup[:2000])
    model = build_model(tokenizer)
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, {len(tokenizer)} tokens, {len(warmup)} warm-up problems")
    warm_up(model, tokenizer, warmup, probe, options.target_pass_rate)
    model.save_pretrained(options.out)
    save_tokenizer(tokenizer, options.out)
    sampled = pass_rate(model, tokenizer, evaluation)
    greedy = pass_rate(model, tokenizer, evaluation, greedy=True)
    print(f"held-out pass rate: {sampled:.2f} sampled at temperature 1, {greedy:.2f} greedy; saved in {options.out}")


if __name__ == "__main__":
    main()
