"""One contestant of the linear cases of `cpu_kernels.py`, in a process of its own so that its memory can be seen.

Log-probs of chosen tokens from hidden states and output weight, and the gradients of both. A line on stdin asks for a
call; the answer is a line of JSON: seconds, and the highest resident memory above what was there before the call.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from xrl.algorithms.loss_settings import TokenLossSettings
from xrl.kernels.head.linear_grpo import linear_grpo_loss
from xrl.kernels.head.linear_logprob import linear_logprob
from xrl.kernels.head.token_inputs import TokenInputs

Contestant = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """As a training script writes it."""
    logp = (hidden @ weight.t()).float().log_softmax(1)
    return logp.gather(1, token_ids[:, None])[:, 0].sum()


def logprob(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, token_ids).logprob.sum()


def grpo(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """With old log-probs equal to the current ones, the gradient is that of the log-probs' sum."""
    tokens = TokenInputs(advantages=torch.ones(len(token_ids)))
    return -linear_grpo_loss(hidden, weight, token_ids, tokens, TokenLossSettings()).loss


def contestant(name: str) -> Contestant:
    known: dict[str, Contestant] = {"eager": eager, "xrl logprob": logprob, "xrl grpo": grpo}
    return torch.compile(eager, dynamic=False) if name == "compile" else known[name]


def status_bytes(field: str) -> int:
    """A field of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(call: Contestant, hidden: Tensor, weight: Tensor, token_ids: Tensor) -> dict[str, float]:
    hidden.grad = weight.grad = None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest resident memory so far
    before = status_bytes("VmRSS")
    start = time.perf_counter()
    call(hidden, weight, token_ids).backward()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": status_bytes("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestant", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--hidden-size", type=int, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--num-threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.rows, options.hidden_size, generator=generator).requires_grad_()
    weight = (0.1 * torch.randn(options.vocab_size, options.hidden_size, generator=generator)).requires_grad_()
    token_ids = torch.randint(0, options.vocab_size, (options.rows,), generator=generator)
    call = contestant(options.contestant)
    for _ in sys.stdin:
        print(json.dumps(measure(call, hidden, weight, token_ids)), flush=True)


if __name__ == "__main__":
    main()
