"""The TurboMind engine on a GPU: right after every update, and what it holds and does: `gpu_turbomind.py`.

Run it with the interpreter of LMDeploy's environment (docs/turbomind.md), from anywhere:

    /path/to/lmdeploy-env/bin/python benchmarks/gpu_turbomind.py

A random Qwen3 goes through the engine as a trainer drives it. After each of two updates with different weights, greedy
answers and the log-probs of sampled ones are held against transformers on the same device, in fp32 with the same
weights. Then: free memory through both kinds of sleep, tokens per second, and an update without the mend for
`_export_iter`, which the engine must refuse. The last line is JSON; exit code 1 says that something was wrong, 2 that
there is no device, or no LMDeploy that the engine takes.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.rollout.engines import buckets, generate, push, request
from tests.tiny_models import make_checkpoint, make_model
from xrl.config import SettingsError
from xrl.rollout import create_engine
from xrl.rollout.engine import Engine, EngineError, EngineNotReady
from xrl.rollout.turbomind_driver import TurboMindDriver
from xrl.types import Completion

DEVICE = "cuda:0"
GIB = 2**30
# bf16 products against fp32: noise of about 2^-8 of the logits, which are of size 1 to 5.
GREEDY_GAP = 0.3  # a greedy token's logit may be so far below the largest
# The engine's log-probs may be so many times as far from fp32 as those of transformers in bf16: another order of
# operations, the same rounding.
NOISE_FACTOR = 2.0
CONTEXT_GIB = 1.0  # modules and workspaces that CUDA and cuBLAS keep for a process that has computed
# With the weights of another update they differ by more than
OTHER_WEIGHTS = 0.5

SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
}


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much is asked of the engine."""

    num_prompts: int = 8  # held against the actor, greedy once and sampled four times
    answer_length: int = 64
    num_requests: int = 256  # at once, when tokens per second are counted
    request_length: int = 256


@dataclass
class Report:
    """Figures, and what was wrong."""

    figures: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def expect(self, holds: bool, what: str) -> None:
        print(f"{'ok' if holds else 'WRONG'}: {what}", flush=True)
        if not holds:
            self.wrong.append(what)


def actor(seed: int, sizes: dict[str, Any]) -> Any:
    """A random model whose weights are exact in bf16, computing in fp32."""
    model: Any = make_model("qwen3", tied=False, seed=seed, **sizes)
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    return model.to(DEVICE)


def logits_of(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """[len(response), V] fp32, from which each token of the response is drawn."""
    with torch.no_grad():
        ids = torch.tensor([prompt + response], device=DEVICE)
        rows: Tensor = model(ids).logits[0, len(prompt) - 1 : -1].float()
    return rows


def logprobs_of(model: Any, prompt: list[int], completion: Completion) -> Tensor:
    """[L] log-probs of the answer's tokens."""
    response = completion.token_ids.tolist()
    logprobs = logits_of(model, prompt, response).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(response, device=DEVICE)[:, None])[:, 0].cpu()


def logprob_differences(model: Any, answers: list[tuple[list[int], Any]]) -> Tensor:
    """|engine - actor| of every sampled token."""
    return torch.cat(
        [(logprobs_of(model, prompt, each) - torch.tensor(each.logprobs)).abs() for prompt, each in answers]
    )


def rounding_noise(model: Any, answers: list[tuple[list[int], Any]]) -> Tensor:
    """|transformers in bf16 - actor| of every sampled token."""
    rounded = copy.deepcopy(model).bfloat16()
    return torch.cat(
        [(logprobs_of(rounded, prompt, each) - logprobs_of(model, prompt, each)).abs() for prompt, each in answers]
    )


def check_update(engine: Engine, version: int, model: Any, other: Any, load: Load, report: Report) -> None:
    """Push `model`, and hold what the engine answers against it, and against the `other` weights."""
    start = time.perf_counter()
    push(engine, model, version)
    seconds = time.perf_counter() - start
    num_bytes = sum(2 * tensor.numel() for bucket in buckets(model) for tensor in bucket.tensors.values())
    generator = torch.Generator().manual_seed(version)
    prompts = torch.randint(0, model.config.vocab_size, (load.num_prompts, 24), generator=generator).tolist()
    greedy = [
        (prompt, generate(engine, prompt, temperature=0, max_new_tokens=load.answer_length)[0]) for prompt in prompts
    ]
    gaps = []
    for prompt, completion in greedy:
        logits = logits_of(model, prompt, completion.token_ids.tolist())
        drawn = logits.gather(-1, torch.tensor(completion.token_ids, device=DEVICE)[:, None])[:, 0]
        gaps.append((logits.amax(-1) - drawn).cpu())
    gap = torch.cat(gaps)
    sampled = [
        (prompt, completion)
        for prompt in prompts
        for completion in generate(engine, prompt, num_samples=4, seed=version, max_new_tokens=load.answer_length)
    ]
    difference = logprob_differences(model, sampled)
    noise = rounding_noise(model, sampled)
    from_other = float(logprob_differences(other, sampled).mean())
    report.figures[f"update_{version}"] = {
        "seconds": round(seconds, 3),
        "GB_per_s": round(num_bytes / seconds / 1e9, 2),
        "greedy_agreement": round(float((gap == 0).float().mean()), 4),
        "greedy_largest_gap": round(float(gap.max()), 4),
        "logprob_mean_difference": round(float(difference.mean()), 5),
        "logprob_largest_difference": round(float(difference.max()), 4),
        "logprob_mean_difference_of_transformers_in_bf16": round(float(noise.mean()), 5),
        "logprob_largest_difference_of_transformers_in_bf16": round(float(noise.max()), 4),
        "logprob_mean_difference_from_other_weights": round(from_other, 3),
    }
    figures = ", ".join(f"{name} {value}" for name, value in report.figures[f"update_{version}"].items())
    print(f"update {version}: {figures}")
    versions = {completion.weights_version for _, completion in greedy + sampled}
    report.expect(versions == {version}, f"update {version}: completions carry its version")
    report.expect(float(gap.max()) <= GREEDY_GAP, f"update {version}: greedy tokens are the actor's")
    report.expect(
        float(difference.mean()) <= NOISE_FACTOR * float(noise.mean())
        and float(difference.max()) <= NOISE_FACTOR * float(noise.max()),
        f"update {version}: log-probs are the actor's, but for the rounding of bf16",
    )
    report.expect(from_other >= OTHER_WEIGHTS, f"update {version}: log-probs are not those of other weights")


def used_gib() -> float:
    """Of the device, by everybody."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def check_sleep(engine: Engine, model: Any, report: Report, used: Callable[[], float], without: float) -> None:
    """Memory through sleep that keeps the weights, and sleep that drops them."""
    prompt = [5, 6, 7]
    before = generate(engine, prompt, temperature=0, max_new_tokens=16)[0].token_ids.tolist()
    memory = {"without an engine": without, "awake": used()}
    engine.sleep()
    memory["asleep, weights on the host"] = used()
    engine.wake()
    report.expect(
        generate(engine, prompt, temperature=0, max_new_tokens=16)[0].token_ids.tolist() == before,
        "wake goes on as before",
    )
    engine.sleep(keep_weights=False)
    memory["asleep, weights dropped"] = used()
    push(engine, model, 3)
    memory["updated in its sleep"] = used()
    try:
        engine.submit(request(prompt))
        report.expect(False, "a sleeping engine refuses requests")
    except EngineNotReady:
        report.expect(True, "a sleeping engine refuses requests")
    engine.wake()
    memory["awake again"] = used()
    after = generate(engine, prompt, temperature=0, max_new_tokens=16)[0].token_ids.tolist()
    report.expect(after == before, "the update in its sleep took effect")
    for state in ("asleep, weights on the host", "asleep, weights dropped"):
        report.expect(memory[state] - without <= CONTEXT_GIB, f"{state}: no more than CUDA's own is held")
    report.figures["used_GiB"] = {name: round(value, 2) for name, value in memory.items()}
    print("used GiB: " + ", ".join(f"{name} {value:.2f}" for name, value in memory.items()))


def measure_speed(engine: Engine, load: Load, report: Report) -> None:
    """Tokens per second, after some that do not count."""
    generate(engine, [5, 6, 7], id="warm-up", num_samples=8, max_new_tokens=load.request_length)
    start = time.perf_counter()
    futures = [
        engine.submit(request([5 + place, 6, 7], id=str(place), seed=place, max_new_tokens=load.request_length))
        for place in range(load.num_requests)
    ]
    total = sum(len(future.result(timeout=600)[0].token_ids) for future in futures)
    report.figures["tokens_per_s"] = round(total / (time.perf_counter() - start))
    print(f"{load.num_requests} requests of {load.request_length} tokens: {report.figures['tokens_per_s']} tokens/s")


def check_mend(engine: Engine, model: Any, report: Report) -> None:
    """That an update is lost without the mend, and that the engine notices. Leaves it without weights."""
    with mock.patch.object(TurboMindDriver, "_forget_export", lambda _: None):
        try:
            for version in (4, 5):
                push(engine, model, version)
            report.expect(False, "an update without the mend is refused")
        except EngineError as error:
            report.expect("took none" in str(error), f"an update without the mend is refused: {error}")


def prove(sizes: dict[str, Any], load: Load, *, used: Callable[[], float]) -> Report:
    """Everything above, on one engine."""
    report = Report()
    models = [actor(seed, sizes) for seed in (1, 2)]
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), tied=False, **sizes)
        begin = used()
        start = time.perf_counter()
        engine = create_engine(
            "turbomind",
            model_dir=Path(folder),
            dtype="bfloat16",
            device="cuda:0",
            max_batch_size=256,
            num_threads=1,
            max_model_len=512,
        )
        try:
            report.figures["start_seconds"] = round(time.perf_counter() - start, 1)
            report.figures["used_GiB_before_the_first_update"] = round(used() - begin, 2)
            check_update(engine, 1, models[0], models[1], load, report)
            check_update(engine, 2, models[1], models[0], load, report)
            check_sleep(engine, models[1], report, used, begin)
            measure_speed(engine, load, report)
            check_mend(engine, models[1], report)
        finally:
            engine.close()
    return report


def main() -> None:
    """Prove, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256, help="at once, when tokens per second are counted")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of each of them")
    options = parser.parse_args()
    if not 0 < options.tokens < 509:
        parser.error(f"--tokens must be from 1 to 508: prompts of 3 and a model of 512, got {options.tokens}")
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and torch finds none.", file=sys.stderr)
        sys.exit(2)
    try:
        load = Load(num_requests=options.requests, request_length=options.tokens)
        report = prove(SIZES, load, used=used_gib)
    except SettingsError as error:
        print(f"This benchmark cannot run: {error}", file=sys.stderr)
        sys.exit(2)
    figures = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "lmdeploy": metadata.version("lmdeploy"),
        **report.figures,
        "wrong": report.wrong,
    }
    print(json.dumps(figures))
    sys.exit(1 if report.wrong else 0)


if __name__ == "__main__":
    main()
