"""One rank of the vocabulary-parallel test: kernels on this rank's columns, against the whole vocabulary in fp64.

Every case must give every rank the whole's log-probs, and the gradient of its own columns.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist

from tests.kernels.head.loss_calls import call_loss
from xrl.algorithms.loss_settings import TokenLossSettings
from xrl.kernels.head.backend import BackendName
from xrl.kernels.head.grpo_loss import grpo_token_loss, reference_grpo_token_loss
from xrl.kernels.head.linear_grpo import linear_grpo_loss, reference_linear_grpo_loss
from xrl.kernels.head.linear_logprob import linear_logprob, reference_linear_logprob
from xrl.kernels.head.logprob import reference_logprob, vocab_parallel_logprob
from xrl.kernels.shards import VocabShard

ROWS = 33
SETTINGS = TokenLossSettings(kl_coef=0.1, entropy_coef=0.02, dual_clip=3.0)


def check(widths: list[int], *, padding: int, offset: float, backend: BackendName, told: bool) -> None:
    """One way of cutting the vocabulary: `widths` columns a rank, each with `padding` columns of NaN behind them."""
    generator = torch.Generator().manual_seed(sum(widths))
    whole = torch.randn(ROWS, sum(widths), generator=generator) * 2 + offset
    # A shard's columns are impossible in one row, all of them; the first and last id of every shard are asked for.
    rank = dist.get_rank()
    starts = [sum(widths[:index]) for index in range(len(widths))]
    if any(widths[1:]):
        whole[0, : widths[0]] = -torch.inf
    edges = [start for start, width in zip(starts, widths, strict=True) if width]
    edges += [start + width - 1 for start, width in zip(starts, widths, strict=True) if width]
    ids = torch.randint(0, sum(widths), (ROWS,), generator=generator)
    ids[0] = sum(widths) - 1
    ids[1 : 1 + len(edges)] = torch.tensor(edges)
    columns = slice(starts[rank], starts[rank] + widths[rank])
    mine = torch.cat([whole[:, columns], torch.full((ROWS, padding), torch.nan)], dim=1).requires_grad_()
    shard = VocabShard(group=dist.group.WORLD, vocab_start=starts[rank] if told else None, num_columns=widths[rank])
    arguments = {"temperature": 0.7, "shard": shard, "backend": backend}

    grads = torch.randn(2, ROWS, generator=generator)
    out = vocab_parallel_logprob(mine, ids, entropy_grad=True, **arguments)
    torch.autograd.backward([out.logprob, out.entropy], list(grads))
    exact = whole.double().requires_grad_()
    wanted = reference_logprob(exact, ids, temperature=0.7)
    torch.autograd.backward([wanted.logprob, wanted.entropy], list(grads.double()))
    for name in ("logprob", "entropy", "logsumexp"):
        found = getattr(out, name).detach().double()
        torch.testing.assert_close(found, getattr(wanted, name).detach(), rtol=1e-6, atol=2e-5, msg=name)
    torch.testing.assert_close(mine.grad[:, : widths[rank]].double(), exact.grad[:, columns], rtol=1e-4, atol=2e-5)
    assert (mine.grad[:, widths[rank] :] == 0).all()

    rows = {
        "advantages": torch.randn(ROWS, generator=generator),
        "shares": torch.rand(ROWS, generator=generator),
        "old_logprobs": out.logprob.detach() + 0.3 * torch.randn(ROWS, generator=generator),
        "reference_logprobs": out.logprob.detach() + 0.3 * torch.randn(ROWS, generator=generator),
    }
    leaf = mine.detach().clone().requires_grad_()
    loss = call_loss(
        grpo_token_loss, logits=leaf * 1.0, token_ids=ids, settings=SETTINGS, **rows, **arguments
    ).token_loss
    loss.sum().backward()
    exact = whole.double().requires_grad_()
    exact_rows = {name: row.double() for name, row in rows.items()}
    reference = {"logits": exact, "token_ids": ids, "settings": SETTINGS, "temperature": 0.7}
    expected = call_loss(reference_grpo_token_loss, **reference, **exact_rows)
    expected.sum().backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(leaf.grad[:, : widths[rank]].double(), exact.grad[:, columns], rtol=1e-4, atol=2e-5)


def check_linear(widths: list[int], *, padding: int, sequence_parallel: bool, backend: BackendName) -> None:
    """The ops from hidden states, against whole logits on one rank; several chunks, rows repeated and masked."""
    generator = torch.Generator().manual_seed(sum(widths))
    rank, size = dist.get_rank(), dist.get_world_size()
    length, width, vocab_size = 6 * size, 16, sum(widths)
    hidden = torch.randn(length, width, generator=generator)
    weight = torch.randn(vocab_size, width, generator=generator)
    ids = torch.randint(0, vocab_size, (ROWS,), generator=generator)
    ids[0], ids[1] = 0, vocab_size - 1
    rows = torch.randint(0, length, (ROWS,), generator=generator)
    start = sum(widths[:rank])
    columns, slice_of_sequence = slice(start, start + widths[rank]), slice(6 * rank, 6 * (rank + 1))
    mine = torch.cat([weight[columns], torch.full((padding, width), 9.0)])
    arguments = {
        "rows": rows,
        "temperature": 0.7,
        "shard": VocabShard(
            group=dist.group.WORLD,
            vocab_start=start,
            num_columns=widths[rank],
            sequence_parallel=sequence_parallel,
        ),
        "backend": backend,
        "chunk_bytes": 4 * max(widths) * 8,  # the same on every rank, whatever it holds
    }

    def leaves() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        here = hidden[slice_of_sequence] if sequence_parallel else hidden
        return (
            here.clone().requires_grad_(),
            mine.clone().requires_grad_(),
            hidden.double().requires_grad_(),
            weight.double().requires_grad_(),
        )

    def compare(my_hidden, my_weight, exact_hidden, exact_weight) -> None:
        wanted = exact_hidden.grad[slice_of_sequence] if sequence_parallel else exact_hidden.grad
        torch.testing.assert_close(my_hidden.grad.double(), wanted, rtol=1e-4, atol=2e-5)
        found = my_weight.grad.double()
        torch.testing.assert_close(found[: widths[rank]], exact_weight.grad[columns], rtol=1e-4, atol=2e-5)
        assert (found[widths[rank] :] == 0).all()

    grads = torch.randn(2, ROWS, generator=generator)
    grads[:, ::4] = 0.0
    tensors = leaves()
    out = linear_logprob(*tensors[:2], ids, entropy_grad=True, **arguments)
    torch.autograd.backward([out.logprob, out.entropy], list(grads))
    wanted = reference_linear_logprob(*tensors[2:], ids, rows=rows, temperature=0.7)
    torch.autograd.backward([wanted.logprob, wanted.entropy], list(grads.double()))
    for name in ("logprob", "entropy", "logsumexp"):
        found = getattr(out, name).detach().double()
        torch.testing.assert_close(found, getattr(wanted, name).detach(), rtol=1e-6, atol=2e-5, msg=name)
    compare(*tensors)

    token_rows = {
        "advantages": torch.randn(ROWS, generator=generator) * (torch.rand(ROWS, generator=generator) > 0.3),
        "shares": torch.rand(ROWS, generator=generator) * (torch.rand(ROWS, generator=generator) > 0.3),
        "old_logprobs": out.logprob.detach() + 0.3 * torch.randn(ROWS, generator=generator),
    }
    tensors = leaves()
    given = {"token_ids": ids, "settings": TokenLossSettings(dual_clip=3.0)}
    heads = [{"hidden": tensors[index], "weight": tensors[index + 1]} for index in (0, 2)]
    loss = call_loss(linear_grpo_loss, **heads[0], **given, **token_rows, **arguments).loss
    loss.backward()
    exact_rows = {name: row.double() for name, row in token_rows.items()}
    given |= {"rows": rows, "temperature": 0.7}
    expected = call_loss(reference_linear_grpo_loss, **heads[1], **given, **exact_rows)
    expected.backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-4, atol=2e-5)
    compare(*tensors)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", required=True)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    even, uneven, empty = [50] * size, [17 + 20 * rank for rank in range(size)], [40] * (size - 1) + [0]
    for widths in (even, uneven, empty):
        for offset in (0.0, 1e4):
            check(widths, padding=3, offset=offset, backend=arguments.backend, told=True)
        check(widths, padding=0, offset=-120.0, backend=arguments.backend, told=False)
        for sequence_parallel in (False, True):
            check_linear(widths, padding=3, sequence_parallel=sequence_parallel, backend=arguments.backend)
    # An id that no shard holds is seen by every rank.
    try:
        vocab_parallel_logprob(torch.zeros(1, 4), torch.tensor([4 * size]), shard=VocabShard(group=dist.group.WORLD))
    except ValueError as error:
        assert "which no shard holds" in str(error)
    else:
        raise AssertionError("an id off every shard went through")
    dist.barrier()  # a rank that leaves early takes the connections of the others with it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
