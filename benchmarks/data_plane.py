"""Memory and seconds of a rollout between the engines and the model: `python benchmarks/data_plane.py`.

1,024 prompts of 64 tokens, 16 answers to each of 512 tokens. Rank 0 takes them over the wire (encoded and decoded as
between a worker and the trainer, but for HTTP), collects and scores them, and gives each of two replicas its own; both
pack theirs into micro-batches, which stay, as they do for an update; what attention makes of them is left out. Two
ranks over gloo, each a process. Engine, tokenizer and judge cost next to nothing. Memory is the peak of what a process
has above its start. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.ranks import groups, layout
from xrl.actor.broadcast import broadcast_sizes, send_samples
from xrl.algorithms.grpo import GRPO
from xrl.config import AlgorithmConfig
from xrl.data.packing import pack, plan_microbatches
from xrl.experience.collect import Collected, Collector
from xrl.rewards import Verdict
from xrl.rollout import protocol
from xrl.rollout.answers import WeightsId, checked_completions
from xrl.rollout.dispatch import RolloutCounts
from xrl.types import Completion, GenerateRequest, Prompt, SamplingParams

VOCAB_SIZE = 151_936
PROMPT_TOKENS = 64
MAX_TOKENS_PER_MICROBATCH = 16_384
WEIGHTS = WeightsId(run_id="a-run", version=3)


class Workers:
    """Answers of random tokens, as they come over the wire."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._rng = np.random.default_rng(0)

    def generate(
        self, requests: Sequence[GenerateRequest], counts: RolloutCounts, *, may_update: bool = False
    ) -> Iterator[tuple[int, list[Completion]]]:
        for place, request in enumerate(requests):
            counts.finished += 1
            yield place, self._wire(request, [self._answer(request) for _ in range(request.num_samples)])

    def _answer(self, request: GenerateRequest) -> Completion:
        length = request.sampling.max_new_tokens
        return Completion(
            token_ids=self._rng.integers(VOCAB_SIZE, size=length, dtype=np.int32),
            logprobs=-self._rng.random(length, np.float32),
            finish_reason="length",
            weights_version=WEIGHTS.version,
        )

    def _wire(self, request: GenerateRequest, answers: Sequence[Completion]) -> list[Completion]:
        body = protocol.completions_to_bytes(answers, num_prompt_tokens=len(request.token_ids), run_id=WEIGHTS.run_id)
        self.num_bytes += len(body)
        return checked_completions(body, request, worker="a worker", vocab_size=VOCAB_SIZE, weights=WEIGHTS)


class Words:
    """A tokenizer and a judge that look at nothing."""

    def __init__(self) -> None:
        self._num_judged = 0

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        return "an answer"

    def submit(self, response: str, prompt: Prompt) -> Future[Verdict]:
        verdict: Future[Verdict] = Future()
        self._num_judged += 1
        verdict.set_result(Verdict(reward=float(self._num_judged % 2)))
        return verdict


class Watch:
    """Seconds of phases that all ranks go through together, and the peak of this process's memory."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self._before = _bytes("VmHWM")
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.peak_mb: dict[str, float] = {}

    def ends(self, phase: str) -> None:
        self.peak_mb[phase] = round((_bytes("VmHWM") - self._before) / 1e6, 1)
        dist.barrier()
        now = time.perf_counter()
        self.seconds[phase] = round(now - self._start, 2)
        self._start = now


def rank_main(options: argparse.Namespace) -> dict[str, Any]:
    dist.init_process_group("gloo", init_method=f"file://{options.store}", rank=options.rank, world_size=2)
    control: Any = dist.group.WORLD
    dist.barrier()
    watch, workers = Watch(), Workers()
    collected = collect(options, workers) if options.rank == 0 else None
    watch.ends("collect")
    samples = None if collected is None else GRPO(AlgorithmConfig()).score(collected.groups).samples
    watch.ends("score")
    sizes = broadcast_sizes(samples, control)
    plan = plan_microbatches(sizes, num_replicas=2, max_tokens=MAX_TOKENS_PER_MICROBATCH, share_prompts=True)
    wanted = [[index for indices in replica for index in indices] for replica in plan]
    own = send_samples(samples, sizes, wanted, groups(layout(data=2), rank=options.rank, control=control))
    watch.ends("broadcast")
    packs = [pack([own[index] for index in indices], share_prompts=True) for indices in plan[options.rank]]
    watch.ends("pack")
    return {
        "peak_mb": watch.peak_mb,
        "seconds": watch.seconds,
        "wire_bytes": workers.num_bytes,
        "trained_tokens": sum(len(each.targets) for each in packs),
    }


def collect(options: argparse.Namespace, workers: Workers) -> Collected:
    words = Words()
    collector = Collector(workers, words, words)  # type: ignore[arg-type]
    prompts = [
        Prompt(id=place, token_ids=[place] * PROMPT_TOKENS, text="a question", ground_truth="1")
        for place in range(options.num_prompts)
    ]
    asking = collector.collect(
        prompts,
        sampling=SamplingParams(max_new_tokens=options.response_tokens),
        num_samples=options.num_samples,
        description="training samples",
    )
    while True:
        try:
            next(asking)
        except StopIteration as end:
            found: Collected = end.value
            return found


def _bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=1024)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--response-tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        print(json.dumps(rank_main(options)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--store", f"{folder}/store", "--rank"]
        ranks = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env={**os.environ})
            for rank in range(2)
        ]
        found = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
    num_tokens = options.num_prompts * options.num_samples * options.response_tokens
    assert sum(one["trained_tokens"] for one in found) == num_tokens
    for rank, one in enumerate(found):
        print(f"rank {rank}: peak MB above the start {one['peak_mb']}, seconds {one['seconds']}")
    print(
        json.dumps(
            {
                "num_tokens": num_tokens,
                "wire_bytes_per_token": round(found[0]["wire_bytes"] / num_tokens, 2),
                "peak_mb": [max(one["peak_mb"].values()) for one in found],
                "seconds": found[0]["seconds"],
            }
        )
    )


if __name__ == "__main__":
    main()
