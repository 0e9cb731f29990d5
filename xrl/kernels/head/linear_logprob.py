"""Log-prob of chosen tokens and entropy straight from hidden states: the [R, V] logits are never held whole.

Shapes: T rows of hidden states on this rank, H hidden, V columns of this rank's shard of the vocabulary, R chosen rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from xrl.kernels.head.backend import BackendName, choose_backend
from xrl.kernels.head.logprob import LogprobOutput, check_found, check_ids, check_temperature, reference_logprob
from xrl.kernels.head.output_head import (
    HeadGradients,
    OutputHead,
    check_head,
    cut,
    main_grad,
    new_accumulator,
    rows_in_chunk,
    wide_dtype,
)
from xrl.kernels.shards import ShardColumns, Softmax, VocabShard, check_shard, combine, find_columns, named_group


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    shard: VocabShard | None = None,
    entropy_grad: bool = False,
    chunk_bytes: int | None = None,
    backend: BackendName = "auto",
) -> LogprobOutput:
    """`vocab_parallel_logprob` of logits = hidden[rows] @ weight^T, of which only a chunk of rows exists at a time.

    Four matrix products, one more than with whole logits: the backward pass computes each chunk's logits again, without
    rows whose gradients are 0. Log-probs come from fp32 logits, also in bf16.

    Under tensor parallelism every rank passes the same hidden states and gets the same gradient of them, summed over
    the ranks. Where `weight` has Megatron's `main_grad`, its gradient is added there and `weight.grad` stays None; not
    inside `torch.compile`, which does not see that attribute.

    Args:
        hidden: [T, H] fp32 or bf16; under sequence parallelism this rank's slice.
        weight: [V, H] this rank's rows of the output weight, of the same type.
        token_ids: [R] int64 or int32, numbered over the whole vocabulary.
        rows: [R] which rows of `hidden` predict the tokens, in any order, repeated ones too; left out: all. Under
            sequence parallelism they count over the whole sequence.
        temperature, shard, entropy_grad, backend: as in `vocab_parallel_logprob`.
        chunk_bytes: how much the logits of a chunk may take; left out: 31 MiB on the CPU, 1 GiB on CUDA.

    Raises:
        ValueError: a wrong shape, type, device, temperature or backend, or (on the CPU) an id that no shard holds.
    """
    chosen_rows, columns = check_arguments(
        hidden,
        weight,
        token_ids,
        rows=rows,
        temperature=temperature,
        shard=shard,
        chunk_bytes=chunk_bytes,
    )
    temperature = float(temperature)
    chunk_rows = rows_in_chunk(weight.shape[0], group=columns.group, device=weight.device, chunk_bytes=chunk_bytes)
    logprob, entropy, maximum, log_sum, found = torch.ops.xrl.linear_logprob(
        hidden,
        weight,
        token_ids,
        chosen_rows,
        temperature,
        columns.group_name,
        shard is not None and shard.sequence_parallel,
        [columns.vocab_start, columns.num_columns, chunk_rows],
        backend,
    )
    check_found(found, token_ids)
    return LogprobOutput(
        logprob=logprob,
        entropy=entropy if entropy_grad else entropy.detach(),
        logsumexp=maximum.detach() / temperature + log_sum.detach(),
    )


def reference_linear_logprob(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *, rows: Tensor | None = None, temperature: float = 1.0
) -> LogprobOutput:
    """The specification of `linear_logprob` on one rank, in plain PyTorch."""
    chosen = hidden if rows is None else hidden[rows.long()]
    return reference_logprob(chosen @ weight.t(), token_ids, temperature=temperature)


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    rows: Tensor | None,
    temperature: float,
    shard: VocabShard | None,
    chunk_bytes: int | None,
) -> tuple[Tensor, ShardColumns]:
    """(chosen rows [R], this rank's columns); raises ValueError."""
    shard = VocabShard() if shard is None else check_shard(shard)
    chosen_rows = check_head(
        hidden,
        weight,
        rows,
        group=shard.group,
        sequence_parallel=shard.sequence_parallel,
        chunk_bytes=chunk_bytes,
    )
    check_ids(token_ids, len(chosen_rows), hidden.device)
    check_temperature(temperature)
    return chosen_rows, find_columns(shard, width=weight.shape[0], device=weight.device, temperature=temperature)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The arguments of an op, as its two passes use them."""

    head: OutputHead
    columns: ShardColumns
    chunk_rows: int
    backend: str

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        temperature: float,
        group_name: str | None,
        sequence_parallel: bool,
        sizes: Sequence[int],
        backend: str,
    ) -> _Call:
        """From what an op is given; `sizes` are id of the first column, columns that count, rows of a chunk."""
        group = named_group(group_name)
        vocab_start, num_columns, chunk_rows = sizes
        return cls(
            head=OutputHead(hidden=hidden, weight=weight, group=group, sequence_parallel=sequence_parallel),
            columns=ShardColumns(
                group=group,
                vocab_start=vocab_start,
                num_columns=num_columns,
                inverse_temperature=1.0 / temperature,
            ),
            chunk_rows=chunk_rows,
            backend=backend,
        )

    def chunks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(span of `rows`, hidden states [C, H], logits [C, V]) of each chunk."""
        for chunk in cut(len(rows), most=self.chunk_rows):
            hidden = self.head.pick(rows[chunk])
            yield chunk, hidden, self.head.logits(hidden)


@torch.library.custom_op("xrl::linear_logprob", mutates_args=())
def _logprob_op(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    rows: Tensor,
    temperature: float,
    group_name: str | None,
    sequence_parallel: bool,
    sizes: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, maximum of the logits, log of the sum of exp, whether the token was found), all [R]."""
    call = _Call.of(hidden, weight, temperature, group_name, sequence_parallel, sizes, backend)
    statistics = hidden.new_empty(4, len(rows), dtype=wide_dtype(hidden))
    for chunk, _, logits in call.chunks(rows):
        chosen = choose_backend(backend, device=logits.device, dtype=logits.dtype)  # type: ignore[arg-type]
        statistics[:, chunk] = chosen.statistics(logits, token_ids[chunk], call.columns)
        del logits  # before the next chunk's are made
    # One collective serves all chunks: four floats a row are little enough to keep.
    softmax = combine(statistics, token_ids, call.columns)
    return softmax.logprob, softmax.entropy, softmax.maximum.clone(), softmax.log_sum, softmax.found


@_logprob_op.register_fake
def _(hidden: Tensor, weight: Tensor, token_ids: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = [hidden.new_empty(token_ids.shape[0], dtype=wide_dtype(hidden)) for _ in range(4)]
    return rows[0], rows[1], rows[2], rows[3], hidden.new_empty(token_ids.shape[0], dtype=torch.bool)


@torch.library.custom_op("xrl::linear_logprob_gradient", mutates_args=("grad_weight",))
def _gradient_op(
    hidden: Tensor,
    weight: Tensor,
    tokens: Sequence[Tensor | None],
    temperature: float,
    group_name: str | None,
    sequence_parallel: bool,
    sizes: Sequence[int],
    backend: str,
    needs_hidden: bool,
    grad_weight: Tensor | None,
) -> Tensor:
    """The gradient of the hidden states, [T, H], or nothing; that of the weight is added to `grad_weight`.

    `tokens` are token_ids, rows, maximum, log_sum, entropy, grad_logprob and grad_entropy, each [R].
    """
    *given, grad_entropy = tokens
    token_ids, rows, maximum, log_sum, entropy, grad_logprob = cast(list[Tensor], given)
    softmax = Softmax(maximum=maximum, log_sum=log_sum, entropy=entropy)
    call = _Call.of(hidden, weight, temperature, group_name, sequence_parallel, sizes, backend)
    moves = grad_logprob != 0
    if grad_entropy is not None:
        moves = moves | (grad_entropy != 0)
    live = moves.nonzero()[:, 0]
    live_rows = rows[live]
    gradients = HeadGradients(call.head, hidden=needs_hidden, weight=grad_weight)
    for chunk, picked, logits in call.chunks(live_rows):
        these = live[chunk]
        chosen = choose_backend(backend, device=logits.device, dtype=logits.dtype)  # type: ignore[arg-type]
        chosen.gradient(
            logits,
            token_ids[these],
            logits,
            columns=call.columns,
            softmax=softmax.select(these),
            grad_logprob=grad_logprob[these],
            grad_entropy=None if grad_entropy is None else grad_entropy[these],
        )
        gradients.add(live_rows[chunk], picked, logits)
        del logits  # before the next chunk's are made
    grad_hidden = gradients.of_hidden()
    return hidden.new_empty(0) if grad_hidden is None else grad_hidden


@_gradient_op.register_fake
def _(hidden: Tensor, *rest: Any) -> Tensor:
    needs_hidden = rest[-2]
    return torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, token_ids, rows, *arguments = inputs
    _, entropy, maximum, log_sum, _ = output
    ctx.save_for_backward(hidden, weight, token_ids, rows, maximum, log_sum, entropy)
    ctx.arguments = arguments
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_logprob is None and grad_entropy is None:
        return (None,) * 9
    hidden, weight, token_ids, rows, maximum, log_sum, entropy = ctx.saved_tensors
    grad_logprob = torch.zeros_like(entropy) if grad_logprob is None else grad_logprob
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    buffer = main_grad(weight) if needs_weight else None
    accumulator = buffer
    if needs_weight and buffer is None:
        accumulator = new_accumulator(weight)
    grad_hidden = torch.ops.xrl.linear_logprob_gradient(
        hidden,
        weight,
        [token_ids, rows, maximum, log_sum, entropy, grad_logprob, grad_entropy],
        *ctx.arguments,
        needs_hidden,
        accumulator,
    )
    grad_weight = accumulator.to(weight.dtype) if accumulator is not None and buffer is None else None
    return grad_hidden if needs_hidden else None, grad_weight, *(None,) * 7


_logprob_op.register_autograd(_backward, setup_context=_save)
