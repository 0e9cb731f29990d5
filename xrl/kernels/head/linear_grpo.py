"""The GRPO loss straight from hidden states, its gradient formed along the way: the logits are never held whole.

Shapes: T rows of hidden states on this rank, H hidden, V columns of this rank's shard of the vocabulary, R chosen rows,
C of them in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xrl.algorithms.loss_settings import TokenLossSettings
from xrl.kernels.head.backend import Backend, BackendName, choose_backend
from xrl.kernels.head.grpo_loss import (
    GrpoLossOutput,
    reference_grpo_token_loss,
    require_upstream,
    row_outputs,
)
from xrl.kernels.head.grpo_rows import ROW_OUTPUTS, SINGLE_PASS_OUTPUTS, as_numbers, from_numbers
from xrl.kernels.head.linear_logprob import check_arguments
from xrl.kernels.head.output_head import (
    HeadGradients,
    OutputHead,
    cut,
    main_grad,
    new_accumulator,
    one_ahead,
    rows_in_chunk,
    wide_dtype,
)
from xrl.kernels.head.token_inputs import TokenInputs, check_token_inputs
from xrl.kernels.shards import ShardColumns, Softmax, TokenSoftmax, VocabShard, named_group, start_combining

# Below this share of rows without a gradient, leaving them out costs more than it saves.
_WORTH_LEAVING_OUT = 1 / 16


@dataclass(frozen=True, kw_only=True)
class LinearGrpoLossOutput:
    """The loss, and its per-token terms."""

    loss: Tensor  # [] sum of the token losses; carries the gradient
    tokens: GrpoLossOutput  # each [R], without a gradient


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    tokens: TokenInputs,
    settings: TokenLossSettings,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    shard: VocabShard | None = None,
    upstream: float | None = None,
    chunk_bytes: int | None = None,
    backend: BackendName = "auto",
) -> LinearGrpoLossOutput:
    """The sum of `grpo_token_loss` of logits = hidden[rows] @ weight^T, of which only a chunk exists at a time.

    A token's loss depends on its own row alone, so a chunk's gradient is known as soon as its softmax is: three matrix
    products (logits, gradient of the hidden states, gradient of the weight), where computing the logits again in the
    backward pass would make four. Masked rows are left out of all three, rows without a gradient (clipped, or without
    an advantage) of the last two. Under tensor parallelism, the exchange of a chunk's four floats a row and the sum of
    its gradients over the ranks run while the next chunk is computed.

    Inside `torch.compile` gradients always wait in buffers of their own.

    Args:
        hidden, weight, token_ids, rows, chunk_bytes: as in `linear_logprob`. Ids are ignored
            where the share is 0.
        tokens, settings: as in `grpo_token_loss`.
        temperature, shard, backend: as in `vocab_parallel_logprob`.
        upstream: the gradient that the backward pass will bring to the loss. With it the weight's gradient goes
            straight into Megatron's `main_grad`, if there is one, in the FORWARD pass, and `weight.grad` stays None:
            a forward pass whose backward pass never comes then leaves its gradient there. Without `main_grad`, or with
            `upstream` left out, gradients wait in buffers of their own ([V, H] fp32 for the weight); left out, they are
            multiplied by whatever arrives.

    Raises:
        ValueError: as `linear_logprob` and `grpo_token_loss` do.
        RuntimeError: in the backward pass, if something other than `upstream` arrives.
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
    sequence_parallel = shard is not None and shard.sequence_parallel
    tokens = check_token_inputs(tokens, settings, num_rows=len(chosen_rows), device=hidden.device)
    chunk_rows = rows_in_chunk(
        weight.shape[0],
        group=columns.group,
        device=weight.device,
        chunk_bytes=chunk_bytes,
        num_alive=1 if columns.group is None else 2,  # while a chunk's statistics travel, the next one is made
    )
    # Inside the function gradients are off, and it cannot tell.
    wanted = torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    if torch.compiler.is_compiling():
        loss, *outputs, _, _ = torch.ops.xrl.linear_grpo_loss(
            hidden,
            weight,
            [token_ids, chosen_rows, *tokens.tensors()],
            as_numbers(settings),
            columns.inverse_temperature,
            [columns.vocab_start, columns.num_columns, chunk_rows],
            columns.group_name,
            sequence_parallel,
            backend,
            upstream,
            list(wanted),
        )
    else:
        head = OutputHead(
            hidden=hidden.detach(), weight=weight.detach(), group=columns.group, sequence_parallel=sequence_parallel
        )
        call = _Call(head=head, columns=columns, settings=settings, chunk_rows=chunk_rows, backend=backend)
        loss, *outputs = _LinearGrpoLoss.apply(hidden, weight, token_ids, chosen_rows, tokens, call, upstream, wanted)
    return LinearGrpoLossOutput(loss=loss, tokens=GrpoLossOutput.of(outputs[-1][0], *outputs))


def reference_linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    tokens: TokenInputs,
    settings: TokenLossSettings,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The specification of `linear_grpo_loss` on one rank, in plain PyTorch: [], every id must be real."""
    chosen = hidden if rows is None else hidden[rows.long()]
    return reference_grpo_token_loss(chosen @ weight.t(), token_ids, tokens, settings, temperature=temperature).sum()


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A chunk between its logits and its gradient."""

    span: slice  # among the unmasked rows
    hidden: Tensor  # [C, H]
    logits: Tensor  # [C, V]
    softmax: Callable[[], TokenSoftmax]  # waits for the other shards


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What stays the same over all chunks."""

    head: OutputHead
    columns: ShardColumns
    settings: TokenLossSettings
    chunk_rows: int
    backend: BackendName

    def choose(self, logits: Tensor) -> Backend:
        return choose_backend(self.backend, device=logits.device, dtype=logits.dtype)

    def begin(self, rows: Tensor, token_ids: Tensor) -> Iterator[_Chunk]:
        """Each chunk as soon as its statistics are under way to the other shards."""
        for span in cut(len(rows), most=self.chunk_rows):
            yield self._begin(span, rows[span], token_ids[span])

    def _begin(self, span: slice, rows: Tensor, token_ids: Tensor) -> _Chunk:
        hidden = self.head.pick(rows)
        logits = self.head.logits(hidden)
        statistics = self.choose(logits).statistics(logits, token_ids, self.columns)
        softmax = start_combining(statistics, token_ids, self.columns)
        return _Chunk(span=span, hidden=hidden, logits=logits, softmax=softmax)

    def add_gradient(
        self,
        gradients: HeadGradients,
        chunk: _Chunk,
        rows: Tensor,
        token_ids: Tensor,
        softmax: Softmax,
        grad_logprob: Tensor,
        grad_entropy: Tensor,
    ) -> None:
        """Turn a chunk's logits into their gradient, and add what it gives. Arguments are the chunk's rows, [C]."""
        hidden, logits = chunk.hidden, chunk.logits
        moves = (grad_logprob != 0) | (grad_entropy != 0)
        live = moves.nonzero()[:, 0]
        if len(live) <= (1 - _WORTH_LEAVING_OUT) * len(moves):
            hidden, logits = hidden[live], logits[live]
            rows, token_ids, softmax = rows[live], token_ids[live], softmax.select(live)
            grad_logprob, grad_entropy = grad_logprob[live], grad_entropy[live]
        if not len(live):
            return
        self.choose(logits).gradient(
            logits,
            token_ids,
            logits,
            columns=self.columns,
            softmax=softmax,
            grad_logprob=grad_logprob,
            grad_entropy=grad_entropy if self.settings.entropy_coef else None,
        )
        gradients.add(rows, hidden, logits)

    def compute(
        self, token_ids: Tensor, rows: Tensor, tokens: TokenInputs, gradients: HeadGradients | None, *, factor: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(log-prob [R], entropy [R], `Backend.grpo_rows` [ROW_OUTPUTS, R]); gradients times `factor` are added up."""
        assert tokens.shares is not None
        unmasked = (tokens.shares != 0).nonzero()[:, 0]
        some = tokens.select(unmasked)
        some_rows, some_ids = rows[unmasked], token_ids[unmasked]
        results = tokens.shares.new_zeros(len(SINGLE_PASS_OUTPUTS), len(unmasked))
        for chunk in one_ahead(self.begin(some_rows, some_ids), ahead=self.head.group is not None):
            span, softmax = chunk.span, chunk.softmax()
            ids = some_ids[span]
            backend = self.choose(chunk.logits)
            logprob, entropy, outputs = row_outputs(backend, softmax, ids, some.select(span), self.settings)
            results[0, span], results[1, span], results[2:, span] = logprob, entropy, outputs
            if gradients is not None:
                grad_logprob, grad_entropy = factor * outputs[1], factor * outputs[2]
                self.add_gradient(gradients, chunk, some_rows[span], ids, softmax, grad_logprob, grad_entropy)
            del chunk  # and its logits, before the next one's are made
        everything = results.new_zeros(len(results), len(rows))
        everything[:, unmasked] = results
        return everything[0], everything[1], everything[2:]


class _LinearGrpoLoss(torch.autograd.Function):
    """(loss [], log-prob [R], entropy [R], `Backend.grpo_rows` [ROW_OUTPUTS, R])"""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        rows: Tensor,
        tokens: TokenInputs,
        call: _Call,
        upstream: float | None,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight = wanted
        buffer = main_grad(weight) if needs_weight and upstream is not None else None
        accumulator = new_accumulator(weight) if needs_weight and buffer is None else buffer
        gradients = HeadGradients(call.head, hidden=needs_hidden, weight=accumulator)
        logprob, entropy, outputs = call.compute(
            token_ids,
            rows,
            tokens,
            gradients if needs_hidden or needs_weight else None,
            factor=1.0 if upstream is None else upstream,
        )
        ctx.gradients = gradients.of_hidden(), None if buffer is not None else accumulator
        ctx.upstream = upstream
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(logprob, entropy, outputs)
        return outputs[0].sum(), logprob, entropy, outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of linear_grpo_loss can be taken once")
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        arrived = grads[0]
        if ctx.upstream is not None:
            require_upstream(arrived, ctx.upstream)
        else:
            grad_hidden = None if grad_hidden is None else grad_hidden.mul_(arrived)
            grad_weight = None if grad_weight is None else grad_weight.mul_(arrived)
        return grad_hidden, None if grad_weight is None else grad_weight.to(ctx.weight_dtype), *(None,) * 6


@torch.library.custom_op("xrl::linear_grpo_loss", mutates_args=())
def _loss_op(
    hidden: Tensor,
    weight: Tensor,
    tokens: Sequence[Tensor | None],
    settings: Sequence[float],
    inverse_temperature: float,
    sizes: Sequence[int],
    group_name: str | None,
    sequence_parallel: bool,
    backend: str,
    upstream: float | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `_LinearGrpoLoss` computes as one node of a compiled graph, and both gradients, empty where not wanted.

    Such a graph keeps values, not memory: `main_grad` stays out of it. `tokens` are token_ids, rows, then those of
    `TokenInputs`; `sizes` id of the first column, columns that count, rows of a chunk; `wanted` whether the gradients
    of hidden states and weight are.
    """
    token_ids, rows, *others = tokens
    assert token_ids is not None and rows is not None
    vocab_start, num_columns, chunk_rows = sizes
    wants_hidden, wants_weight = wanted
    group = named_group(group_name)
    call = _Call(
        head=OutputHead(hidden=hidden, weight=weight, group=group, sequence_parallel=sequence_parallel),
        columns=ShardColumns(
            group=group,
            vocab_start=vocab_start,
            num_columns=num_columns,
            inverse_temperature=inverse_temperature,
        ),
        settings=from_numbers(settings),
        chunk_rows=chunk_rows,
        backend=backend,  # type: ignore[arg-type]
    )
    accumulator = new_accumulator(weight) if wants_weight else None
    gradients = HeadGradients(call.head, hidden=wants_hidden, weight=accumulator)
    logprob, entropy, outputs = call.compute(
        token_ids,
        rows,
        TokenInputs.of(others),
        gradients if wants_hidden or wants_weight else None,
        factor=1.0 if upstream is None else upstream,
    )
    grad_hidden = gradients.of_hidden()
    return (
        outputs[0].sum(),
        logprob.clone(),  # outputs of an op may not share memory
        entropy.clone(),
        outputs.clone(),
        hidden.new_empty(0) if grad_hidden is None else grad_hidden,
        hidden.new_empty(0) if accumulator is None else accumulator,
    )


@_loss_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, tokens: Sequence[Tensor | None], *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wants_hidden, wants_weight = others[-1]
    token_ids, _, advantages, *_ = tokens
    assert token_ids is not None and advantages is not None
    num_rows = token_ids.shape[0]  # not len(), which would make a constant of it
    shapes: tuple[tuple[int, ...], ...] = ((), (num_rows,), (num_rows,), (len(ROW_OUTPUTS), num_rows))
    loss, logprob, entropy, outputs = (advantages.new_empty(shape) for shape in shapes)
    grad_hidden = hidden.new_empty(hidden.shape if wants_hidden else 0)
    grad_weight = weight.new_empty(weight.shape, dtype=wide_dtype(weight)) if wants_weight else hidden.new_empty(0)
    return loss, logprob, entropy, outputs, grad_hidden, grad_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[4:])
    ctx.upstream, ctx.wanted, ctx.weight_dtype = inputs[9], inputs[10], inputs[1].dtype
    ctx.no_tokens = [None] * len(inputs[2])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    grad_hidden, grad_weight = (
        torch.ops.xrl.scaled_gradient(gradient, grad.reshape(1), ctx.upstream) if is_wanted else None
        for gradient, is_wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    grad_weight = None if grad_weight is None else grad_weight.to(ctx.weight_dtype)
    return grad_hidden, grad_weight, ctx.no_tokens, *(None,) * 8


_loss_op.register_autograd(_backward, setup_context=_save)
