"""Log-probs and loss of a micro-batch, against the same in plain PyTorch."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.ranks import groups, layout
from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from xrl.actor.microbatch import Microbatch  # noqa: E402
from xrl.actor.scorer import TokenScorer  # noqa: E402
from xrl.algorithms.grpo import GRPO  # noqa: E402
from xrl.config import AlgorithmConfig  # noqa: E402
from xrl.models.head import ResponseRows  # noqa: E402
from xrl.types import LossInputs  # noqa: E402

VOCAB, PADDED, WIDTH = 11, 12, 6
TEMPERATURE = 0.7
IDS = torch.tensor([3, 0, 10, 5])  # the first and the last token of the vocabulary among them
ROWS = torch.tensor([1, 2, 4, 5])


def scorer(*, linear: bool = False, upstream: float = 1.0) -> TokenScorer:
    head = ResponseRows(sequence_parallel=False, tensor_group=groups().tensor, returns_hidden=linear)
    if linear:
        head.weight = torch.nn.Parameter(torch.randn(PADDED, WIDTH, generator=torch.Generator().manual_seed(2)))
    return TokenScorer(
        backend="auto",
        groups=groups(),
        head=head,
        vocab_size=VOCAB,
        columns=PADDED,
        upstream=upstream,
    )


def microbatch() -> Microbatch:
    none = torch.empty(0)
    return Microbatch(
        input_ids=none,
        position_ids=none,
        attention=None,
        rows=ROWS,
        response_ids=IDS,
        rollout_logprobs=torch.tensor([-1.0, -2.5, -0.5, -3.0]),
        advantages=torch.tensor([1.0, 1.0, -0.5, -0.5]),
        token_shares=torch.tensor([0.1, 0.2, 0.3, 0.4]),
        sequence_ids=torch.tensor([0, 0, 1, 1]),
        num_sequences=2,
        temperature=TEMPERATURE,
        num_tokens=6,
    )


def logits() -> Tensor:
    """Of each response token; what the last column holds, which is padding, must not matter."""
    found = torch.randn(len(IDS), PADDED, generator=torch.Generator().manual_seed(1)) * 2
    found[:, VOCAB:] = 50.0
    return found.requires_grad_()


def hidden() -> Tensor:
    return torch.randn(6, 1, WIDTH, generator=torch.Generator().manual_seed(3)).flatten(0, 1).requires_grad_()


def expected_logprobs(of: Tensor) -> Tensor:
    """[R, V] in fp64."""
    return (of[:, :VOCAB].double() / TEMPERATURE).log_softmax(1)


def test_log_probs_are_those_of_the_tokens_at_the_sampling_temperature() -> None:
    given = logits()
    found = scorer().logprobs(given, microbatch())
    every = expected_logprobs(given.detach())
    torch.testing.assert_close(found.logprob.double(), every[range(4), IDS], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.entropy.double(), -(every.exp() * every).sum(1), rtol=1e-6, atol=1e-6)
    assert found.logprob.dtype == torch.float32


def test_their_gradient_is_that_of_plain_pytorch_and_none_reaches_the_padding() -> None:
    given, exact = logits(), logits()
    scorer().logprobs(given, microbatch()).logprob.sum().backward()
    expected_logprobs(exact)[range(4), IDS].sum().backward()
    torch.testing.assert_close(given.grad, exact.grad, rtol=1e-5, atol=1e-6)
    assert given.grad is not None and not given.grad[:, VOCAB:].any()


@pytest.mark.parametrize("asked", [False, True])
def test_entropy_has_a_gradient_where_it_is_asked_for(asked: bool) -> None:
    assert scorer().logprobs(logits(), microbatch(), entropy_grad=asked).entropy.requires_grad is asked


def test_log_probs_are_at_the_temperature_of_their_own_micro_batch() -> None:
    given = logits().detach()
    found = scorer().logprobs(given, dataclasses.replace(microbatch(), temperature=1.4)).logprob
    expected = (given[:, :VOCAB].double() / 1.4).log_softmax(1)[range(4), IDS]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_hidden_states_give_the_log_probs_of_the_logits_that_they_make() -> None:
    one = scorer(linear=True)
    given = hidden()
    weight = cast(Tensor, one.head.weight)
    found = one.logprobs(given, microbatch()).logprob
    every = expected_logprobs(given.detach()[ROWS] @ weight.detach().T)
    torch.testing.assert_close(found.double(), every[range(4), IDS], rtol=1e-5, atol=1e-5)
    found.sum().backward()
    exact, exact_weight = hidden(), weight.detach().clone().requires_grad_()
    expected_logprobs(exact[ROWS] @ exact_weight.T)[range(4), IDS].sum().backward()
    torch.testing.assert_close(given.grad, exact.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, exact_weight.grad, rtol=1e-4, atol=1e-5)


ALGORITHMS = {
    "plain": AlgorithmConfig(),
    "clipped": AlgorithmConfig(clip_low=0.1, clip_high=0.3, dual_clip=2.0),
    "kl and entropy": AlgorithmConfig(kl_coef=0.05, entropy_coef=0.01),
    "importance": AlgorithmConfig(importance_correction="truncate", importance_bound=1.5),
}


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_loss_that_forms_its_gradient_at_once_is_the_algorithm_s(name: str, with_old: bool, linear: bool) -> None:
    config = ALGORITHMS[name]
    batch = microbatch()
    old = torch.tensor([-1.5, -2.0, -1.0, -2.5]) if with_old else None
    reference = torch.tensor([-1.2, -2.2, -0.8, -2.9]) if config.kl_coef else None
    # What the backward pass brings is told, as the gradient is formed before it comes.
    fused, plain = (scorer(linear=linear, upstream=4.0) for _ in range(2))
    given, exact = (hidden(), hidden()) if linear else (logits(), logits())
    # Of a copy: the kernel writes its gradient where the logits were.
    loss, tokens = fused.grpo_loss(given * 1.0, batch, config, old=old, reference=reference)
    (4 * loss).backward()

    scored = plain.logprobs(exact, batch, entropy_grad=bool(config.entropy_coef))
    expected = GRPO(config).loss(
        LossInputs(
            logprobs=scored.logprob,
            entropy=scored.entropy,
            old_logprobs=scored.logprob.detach() if old is None else old,
            rollout_logprobs=batch.rollout_logprobs,
            reference_logprobs=reference,
            advantages=batch.advantages,
            token_shares=batch.token_shares,
            sequence_ids=batch.sequence_ids,
            num_sequences=batch.num_sequences,
        )
    )
    (4 * expected.loss).backward()
    torch.testing.assert_close(loss.detach(), expected.loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens.logprob, scored.logprob.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens.entropy, scored.entropy.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(given.grad, exact.grad, rtol=1e-4, atol=1e-5)
    if linear:
        found, wanted = (cast(Tensor, each.head.weight).grad for each in (fused, plain))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_no_response_tokens_give_no_log_probs_and_a_loss_of_zero() -> None:
    none = torch.empty(0)
    batch = dataclasses.replace(
        microbatch(),
        rows=none.long(),
        response_ids=none.long(),
        rollout_logprobs=none,
        advantages=none,
        token_shares=none,
    )
    given = torch.empty(0, PADDED, requires_grad=True)
    assert scorer().logprobs(given, batch).logprob.tolist() == []
    loss, _ = scorer().grpo_loss(given * 1.0, batch, AlgorithmConfig(), old=None, reference=None)
    assert loss.item() == 0.0
    loss.backward()  # every rank takes part


def test_a_log_prob_that_is_no_number_is_seen_in_the_loss() -> None:
    given = logits().detach()
    given[1, 0] = math.nan
    loss, _ = scorer().grpo_loss(
        given.requires_grad_() * 1.0, microbatch(), AlgorithmConfig(), old=None, reference=None
    )
    assert math.isnan(loss.item())


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [
        (98, [(0, 25), (25, 25), (50, 25), (75, 23)]),  # the last rank's last columns are padding
        (5, [(0, 2), (2, 2), (4, 1), (6, 0)]),  # the last rank has none but padding
    ],
)
def test_each_tensor_rank_tells_the_kernels_which_columns_it_has(
    vocab_size: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("xrl.actor.scorer.vocab_parallel_logprob", lambda *_, **named: told.append(named))
    ranks, group = layout(tensor=4), SimpleNamespace()
    for rank in range(4):
        dataclasses.replace(
            scorer(),
            groups=dataclasses.replace(groups(ranks, rank=rank), tensor=cast(Any, group)),
            vocab_size=vocab_size,
            columns=ranks.padded_vocab_size(vocab_size) // 4,
        ).logprobs(torch.empty(0), microbatch())
    assert [(each["shard"].vocab_start, each["shard"].num_columns) for each in told] == expected
    assert all(each["shard"].group is group and each["temperature"] == TEMPERATURE for each in told)
