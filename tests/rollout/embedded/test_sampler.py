"""Random numbers that know their place, and the filters of the sampler."""

import numpy as np
import pytest
import torch
from torch import Tensor

from xrl.rollout.embedded.sampler import filter_logits, sample, splitmix64, uniforms


def counts(logits: Tensor, draws: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """[V] how often each token is drawn from one row of logits."""
    place = np.arange(draws)
    tokens, _ = sample(
        logits.repeat(draws, 1),
        torch.full((draws,), temperature),
        torch.full((draws,), top_k),
        torch.full((draws,), top_p),
        torch.from_numpy(uniforms(np.full(draws, 5), place // 100, place % 100)),
    )
    return torch.bincount(tokens, minlength=logits.shape[-1])


def test_splitmix64_gives_the_published_sequence() -> None:
    state = np.array([1234567], dtype=np.uint64)
    assert splitmix64(state)[0] == 6457827717110365317
    assert splitmix64(state + np.uint64(0x9E3779B97F4A7C15))[0] == 3203168211198807973


def test_uniforms_depend_on_every_coordinate_and_on_nothing_else() -> None:
    seeds, samples, positions = np.meshgrid(np.arange(-3, 7), np.arange(10), np.arange(10), indexing="ij")
    grid = uniforms(seeds.ravel(), samples.ravel(), positions.ravel())
    assert len(np.unique(grid)) == 1000
    assert grid.min() >= 0
    assert grid.max() < 1
    assert uniforms(np.array([2]), np.array([4]), np.array([6])) == grid.reshape(10, 10, 10)[5, 4, 6]


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    drawn = uniforms(np.zeros(100_000, dtype=np.int64), np.arange(100_000) // 100, np.arange(100_000) % 100)
    histogram = np.histogram(drawn, bins=50, range=(0, 1))[0]
    chi_square = ((histogram - 2000) ** 2 / 2000).sum()
    assert chi_square < 94.6  # 1 - 1e-4 quantile of 49 degrees of freedom


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature: float) -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, 1.1, -0.4, 0.9, -2.0]])
    expected = (logits[0] / temperature).softmax(-1) * 40_000
    chi_square = ((counts(logits, 40_000, temperature=temperature) - expected) ** 2 / expected).sum()
    assert chi_square < 29.9  # 1 - 1e-4 quantile of 7 degrees of freedom


def test_top_k_draws_only_the_k_likeliest_and_renormalises() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]])
    drawn = counts(logits, 20_000, top_k=2)
    expected = torch.tensor([3.0, 2.0]).softmax(-1) * 20_000
    assert drawn[[0, 2, 4]].sum() == 0
    assert ((drawn[[1, 3]] - expected) ** 2 / expected).sum() < 15.1  # 1 degree of freedom


def test_top_p_keeps_the_fewest_tokens_that_hold_the_share() -> None:
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    for share, kept in ((0.4, [1]), (0.6, [1, 3]), (0.79, [1, 3]), (0.9, [0, 1, 3]), (1.0, [0, 1, 2, 3])):
        settings = torch.tensor([1.0]), torch.tensor([0]), torch.tensor([share])
        assert filter_logits(logits, *settings)[0].isfinite().nonzero()[:, 0].tolist() == kept


def test_top_p_applies_to_what_top_k_leaves_at_the_sampling_temperature() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    hot = filter_logits(logits, torch.tensor([10.0]), torch.tensor([3]), torch.tensor([0.6]))
    cold = filter_logits(logits, torch.tensor([0.1]), torch.tensor([3]), torch.tensor([0.6]))
    assert hot[0].isfinite().tolist() == [False, True, True, False]
    assert cold[0].isfinite().tolist() == [False, True, False, False]


def test_logprobs_are_those_of_the_filtered_distribution() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]] * 2)
    temperatures, top_k, top_p = torch.tensor([0.7, 0.7]), torch.tensor([2, 0]), torch.tensor([1.0, 1.0])
    tokens, logprobs = sample(logits, temperatures, top_k, top_p, torch.tensor([0.1, 0.1], dtype=torch.float64))
    filtered = torch.log_softmax(torch.tensor([3.0, 2.0]) / 0.7, dim=-1)
    whole = torch.log_softmax(torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0]) / 0.7, dim=-1)
    assert tokens[0] == 1
    torch.testing.assert_close(logprobs, torch.stack([filtered[0], whole[tokens[1]]]), rtol=0, atol=1e-6)


def test_greedy_rows_ignore_the_filters() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    tokens, logprobs = sample(
        logits, torch.tensor([0.0]), torch.tensor([1]), torch.tensor([0.1]), torch.tensor([0.9]).double()
    )
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logprobs, torch.log_softmax(torch.tensor([0.0, 3.0, 1.0]), dim=-1)[1:2])
