"""Log-prob of chosen tokens and entropy of their distributions, from vocabulary-parallel logits.

Shapes: R rows, V columns of this rank's shard of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xrl.kernels.arguments import check_instance
from xrl.kernels.head.backend import Backend, BackendName, choose_backend
from xrl.kernels.shards import ShardColumns, Softmax, VocabShard, combine, find_columns, named_group

_LOWEST_TEMPERATURE = 1 / torch.finfo(torch.float32).max
_HIGHEST_TEMPERATURE = torch.finfo(torch.float64).max


@dataclass(frozen=True, kw_only=True)
class LogprobOutput:
    """All [R], fp32 (fp64 for fp64 logits)."""

    logprob: Tensor  # log softmax(logits / temperature)[token]
    entropy: Tensor  # of softmax(logits / temperature), in nats
    logsumexp: Tensor  # of logits / temperature; carries no gradient


def vocab_parallel_logprob(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    shard: VocabShard | None = None,
    entropy_grad: bool = False,
    backend: BackendName = "auto",
) -> LogprobOutput:
    """Log-prob and entropy over the whole vocabulary, of which each rank may hold some columns.

        logprob_r = x_r[token_r] - logsumexp(x_r),  entropy_r = logsumexp(x_r) - sum_v p_rv x_rv,  x = logits / T

    The logits are read once forward; backward they are read and their gradient is written. Under tensor parallelism
    one all-gather of four floats a row joins the shards, and the backward pass is local.

    Args:
        logits: [R, V] floating point.
        token_ids: [R] int64 or int32, numbered over the whole vocabulary.
        temperature: > 0; any value at run time.
        shard: which columns the logits are, and the ranks that hold the others; left out: all of them.
        entropy_grad: whether the entropy carries a gradient; without, the backward pass is cheaper.
        backend: what computes it; see `python -m xrl.kernels`.

    Raises:
        ValueError: a wrong shape, type, device, temperature or backend, or (on the CPU) an id that no shard holds. On
            CUDA such an id gives NaN: looking at values there would wait for the device.
    """
    check_logits(logits, token_ids, temperature)
    temperature = float(temperature)
    columns = find_columns(shard, width=logits.shape[1], device=logits.device, temperature=temperature)
    logprob, entropy, maximum, log_sum, found = torch.ops.xrl.vocab_parallel_logprob(
        logits,
        token_ids,
        temperature,
        columns.group_name,
        columns.vocab_start,
        columns.num_columns,
        backend,
    )
    check_found(found, token_ids)
    return LogprobOutput(
        logprob=logprob,
        entropy=entropy if entropy_grad else entropy.detach(),
        logsumexp=maximum.detach() / temperature + log_sum.detach(),
    )


def reference_logprob(
    logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0, num_columns: int | None = None
) -> LogprobOutput:
    """The specification of `vocab_parallel_logprob` on one rank, in plain PyTorch; differentiable in all outputs."""
    x = logits[:, :num_columns]
    x = (x if x.dtype == torch.float64 else x.float()) / temperature
    logp = x.log_softmax(1)
    # A token of probability 0 adds nothing; 0 * -inf would be NaN.
    entropy = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(1)
    return LogprobOutput(
        logprob=logp.gather(1, token_ids.long()[:, None])[:, 0], entropy=entropy, logsumexp=x.logsumexp(1)
    )


@torch.library.custom_op("xrl::vocab_parallel_logprob", mutates_args=())
def _logprob_op(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float,
    group_name: str | None,
    vocab_start: int,
    num_columns: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, maximum of the logits, log of the sum of exp, whether the token was found), all [R]."""
    rows = adjacent(logits)
    chosen = _backend(backend, rows)
    columns = ShardColumns(
        group=named_group(group_name),
        vocab_start=vocab_start,
        num_columns=num_columns,
        inverse_temperature=1.0 / temperature,
    )
    softmax = combine(chosen.statistics(rows, token_ids, columns), token_ids, columns)
    # Outputs of an op may not share memory, and the maximum is a row of the statistics.
    return softmax.logprob, softmax.entropy, softmax.maximum.clone(), softmax.log_sum, softmax.found


@_logprob_op.register_fake
def _(logits: Tensor, token_ids: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = [logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(4)]
    return rows[0], rows[1], rows[2], rows[3], logits.new_empty(logits.shape[0], dtype=torch.bool)


@torch.library.custom_op("xrl::logprob_gradient", mutates_args=())
def _gradient_op(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float,
    vocab_start: int,
    num_columns: int,
    maximum: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    backend: str,
) -> Tensor:
    """The gradient of the logits, [R, V]."""
    rows = adjacent(logits)
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    _backend(backend, rows).gradient(
        rows,
        token_ids,
        out,
        columns=ShardColumns(
            group=None,  # each rank writes its own columns
            vocab_start=vocab_start,
            num_columns=num_columns,
            inverse_temperature=1.0 / temperature,
        ),
        softmax=Softmax(maximum=maximum, log_sum=log_sum, entropy=entropy),
        grad_logprob=grad_logprob.contiguous(),
        grad_entropy=None if grad_entropy is None else grad_entropy.contiguous(),
    )
    return out


@_gradient_op.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, token_ids, temperature, _, vocab_start, num_columns, backend = inputs
    _, entropy, maximum, log_sum, _ = output
    ctx.save_for_backward(logits, token_ids, maximum, log_sum, entropy)
    ctx.arguments = (temperature, vocab_start, num_columns, backend)
    # A gradient that nobody asked for stays None, and costs nothing.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_logprob is None and grad_entropy is None:
        return (None,) * 7
    logits, token_ids, maximum, log_sum, entropy = ctx.saved_tensors
    temperature, vocab_start, num_columns, backend = ctx.arguments
    gradient = torch.ops.xrl.logprob_gradient(
        logits,
        token_ids,
        temperature,
        vocab_start,
        num_columns,
        maximum,
        log_sum,
        entropy,
        torch.zeros_like(entropy) if grad_logprob is None else grad_logprob,
        grad_entropy,
        backend,
    )
    return gradient, None, None, None, None, None, None


_logprob_op.register_autograd(_backward, setup_context=_save)


def check_logits(logits: Tensor, token_ids: Tensor, temperature: float) -> None:
    """Refuse what no backend could make sense of.

    Raises:
        ValueError: naming the tensor, its shape and what was expected.
        TypeError: what should be a tensor is none.
    """
    check_instance("logits", logits, Tensor)
    if logits.layout != torch.strided:
        raise ValueError(f"logits must be a dense tensor, got {logits.layout}")
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [R, V], got {logits.dtype} {list(logits.shape)}")
    check_ids(token_ids, logits.shape[0], logits.device)
    check_temperature(temperature)


def check_ids(token_ids: Tensor, num_rows: int, device: torch.device) -> None:
    """Raises ValueError unless token_ids are whole numbers [R] on `device`; TypeError where they are no tensor."""
    check_instance("token_ids", token_ids, Tensor)
    if token_ids.shape != (num_rows,) or token_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"token_ids must be int64 or int32 [R] = [{num_rows}], got {token_ids.dtype} {list(token_ids.shape)}"
        )
    if token_ids.device != device:
        raise ValueError(f"token_ids are on {token_ids.device}, logits on {device}: they must be on one device")


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless the temperature, and its inverse in fp32, are finite and > 0."""
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    if not 0 < temperature <= _HIGHEST_TEMPERATURE:
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    if temperature < _LOWEST_TEMPERATURE:
        raise ValueError(f"temperature must have an inverse that fp32 can hold, got {temperature}")


def check_found(found: Tensor, token_ids: Tensor) -> None:
    """Raises ValueError where no shard holds a token; on the CPU only, and not while a graph is traced."""
    if torch.compiler.is_compiling() or found.device.type != "cpu" or bool(found.all()):
        return
    row = int((~found).nonzero()[0])
    raise ValueError(
        f"token_ids {list(token_ids.shape)} must be ids of the vocabulary, got {int(token_ids[row])} in row {row}, "
        f"which no shard holds"
    )


def adjacent(logits: Tensor) -> Tensor:
    """Logits whose columns are adjacent in memory, copied where they are not, or where memory has the other sign."""
    logits = logits.resolve_neg()
    is_adjacent = logits.shape[1] <= 1 or logits.stride(1) == 1
    has_rows = logits.shape[0] <= 1 or logits.stride(0) >= logits.shape[1]
    return logits if is_adjacent and has_rows else logits.contiguous()


def _backend(name: str, rows: Tensor) -> Backend:
    return choose_backend(name, device=rows.device, dtype=rows.dtype)  # type: ignore[arg-type]
