"""Samples as the tensors of one replica's micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ranks import groups, layout
from tests.samples import logprobs_of, response_of, sample
from xrl.config import PackingConfig
from xrl.data.packing import size_of
from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from xrl.actor.microbatch import Microbatch, MicrobatchMaker  # noqa: E402
from xrl.models.shape import model_shape  # noqa: E402
from xrl.types import Sample, SampleSize  # noqa: E402

SHAPE = model_shape(
    {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 98,
    }
)
FIRST = sample([7, 8, 9], [4, 2], advantage=0.5, group_id=3)
SECOND = sample([7, 8, 9], [5, 6, 2], advantage=-0.25, group_id=3)
# Each sample and the share of each of its tokens.
SAMPLES, SHARES = [FIRST, SECOND], [0.125, 0.25]


def maker(
    *,
    ranks: Any = None,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
    transformer_engine: bool = False,
    sequence_parallel: bool = False,
    **data: Any,
) -> MicrobatchMaker:
    return MicrobatchMaker(
        packing=PackingConfig(**data),
        shape=SHAPE,
        groups=groups(ranks, rank=rank),
        dtype=dtype,
        transformer_engine=transformer_engine,
        sequence_parallel=sequence_parallel,
    )


def made(by: MicrobatchMaker, samples: Sequence[Sample], shares: Sequence[float]) -> list[Microbatch]:
    """The micro-batches of a replica."""
    plan = by.plan([size_of(each) for each in samples], range(len(samples)))[by.groups.data_rank]
    return [by.make([samples[i] for i in indices], [shares[i] for i in indices]) for indices in plan]


def check_tokens(found: Microbatch, *, rows: list[int], response_ids: list[int]) -> None:
    """Values of a micro-batch that holds FIRST and SECOND, in this order."""
    assert found.rows.tolist() == rows
    assert found.response_ids.tolist() == response_ids == response_of(FIRST) + response_of(SECOND)
    assert found.rollout_logprobs.tolist() == logprobs_of(response_ids)
    assert found.advantages.tolist() == [0.5] * 2 + [-0.25] * 3
    assert found.token_shares.tolist() == [0.125] * 2 + [0.25] * 3
    for tensor in (found.rollout_logprobs, found.advantages, found.token_shares):
        assert tensor.dtype == torch.float32
    for tensor in (found.input_ids, found.position_ids, found.rows, found.response_ids):
        assert tensor.dtype == torch.int64


def predicting_tokens(found: Microbatch) -> list[int]:
    """The token that stands where each response token is predicted."""
    flat: Tensor = found.input_ids.T.flatten()  # the model's hidden states are [S, B]
    return flat[found.rows].tolist()


def test_a_prompt_stands_once_before_all_its_answers() -> None:
    (found,) = made(maker(), SAMPLES, SHARES)
    # The prompt; the first answer but for its last token; the second one likewise.
    assert found.input_ids.tolist() == [[7, 8, 9, 4, 5, 6]]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 3, 4]]
    check_tokens(found, rows=[2, 3, 2, 4, 5], response_ids=[4, 2, 5, 6, 2])
    assert found.num_tokens == 6


def test_without_sharing_each_answer_has_its_own_prompt() -> None:
    (found,) = made(maker(share_prompt_prefix=False), SAMPLES, SHARES)
    assert found.input_ids.tolist() == [[7, 8, 9, 5, 6, 7, 8, 9, 4]]  # the longest first
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert found.response_ids.tolist() == [5, 6, 2, 4, 2]
    assert found.rows.tolist() == [2, 3, 4, 7, 8]
    assert found.advantages.tolist() == [-0.25] * 3 + [0.5] * 2
    assert found.token_shares.tolist() == [0.25] * 3 + [0.125] * 2
    assert found.num_tokens == 9


def test_padded_rows_are_counted_as_the_model_s_hidden_states_lie() -> None:
    (found,) = made(maker(micro_batch_size=2), SAMPLES, SHARES)
    assert found.input_ids.tolist() == [[7, 8, 9, 4, 0], [7, 8, 9, 5, 6]]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    check_tokens(found, rows=[4, 6, 5, 7, 9], response_ids=[4, 2, 5, 6, 2])  # [S, B]
    assert predicting_tokens(found) == [9, 4, 9, 5, 6]
    assert found.num_tokens == 10


@pytest.mark.parametrize("data", [{}, {"share_prompt_prefix": False}, {"micro_batch_size": 4}])
def test_every_response_token_is_predicted_where_the_token_before_it_stands(data: dict[str, Any]) -> None:
    samples = [*SAMPLES, sample([3], [8, 9, 7, 6], group_id=5), sample([1, 2, 4, 5, 6], [3], group_id=6)]
    before = {token: [] for token in range(10)}
    for each in samples:
        sequence = each.token_ids.tolist()
        for place in range(each.prompt_length, len(sequence)):
            before[sequence[place]].append(sequence[place - 1])
    (found,) = made(maker(**data), samples, [0.1] * 4)
    seen = {token: [] for token in range(10)}
    for token, predicting in zip(found.response_ids.tolist(), predicting_tokens(found), strict=True):
        seen[token].append(predicting)
    assert {token: sorted(found) for token, found in seen.items()} == {
        token: sorted(found) for token, found in before.items()
    }


def test_replicas_share_the_samples_and_have_equally_many_micro_batches() -> None:
    samples = [sample([7, group], [group, answer, 2], group_id=group) for group in range(5) for answer in range(3)]
    shares = [1 / 45] * 15
    found = [
        made(maker(ranks=layout(data=4), rank=rank, max_tokens_per_microbatch=12), samples, shares) for rank in range(4)
    ]
    assert len({len(microbatches) for microbatches in found}) == 1
    everything = [each for microbatches in found for each in microbatches]
    assert all(each.num_tokens <= 12 for each in everything)
    assert sum(float(each.token_shares.sum()) for each in everything) == pytest.approx(1.0)
    triples = [triple for each in everything for triple in each.response_ids.view(-1, 3).tolist()]
    assert sorted(triples) == sorted(response_of(each) for each in samples)


def test_tensor_ranks_of_a_replica_make_the_same_micro_batches() -> None:
    ranks = layout(tensor=2, pipeline=2, data=2)
    makers = [maker(ranks=ranks, rank=rank) for rank in range(8)]
    found = [made(each, SAMPLES, SHARES)[0].response_ids.tolist() for each in makers]
    # Of one group a replica gets half: tensor ranks 0 and 1 of replica 0, then of 1, on both stages.
    assert found == [[5, 6, 2], [5, 6, 2], [4, 2], [4, 2]] * 2


def test_a_replica_that_is_short_of_samples_runs_on_a_token_that_nobody_learns_from() -> None:
    empty = [
        each
        for rank in range(3)
        for each in made(maker(ranks=layout(data=3), rank=rank), SAMPLES, SHARES)
        if not len(each.rows)
    ]
    (found,) = empty
    assert (found.input_ids.tolist(), found.num_tokens) == ([[0]], 1)
    for tensor in (found.response_ids, found.rollout_logprobs, found.advantages, found.token_shares):
        assert tensor.tolist() == []


@pytest.mark.parametrize("data", [{}, {"micro_batch_size": 2}])
def test_rows_divide_over_the_ranks_of_sequence_parallelism(data: dict[str, Any]) -> None:
    (found,) = made(maker(ranks=layout(tensor=4), sequence_parallel=True, **data), SAMPLES, SHARES)
    assert found.input_ids.shape == ((2, 8) if data else (1, 8))
    assert predicting_tokens(found) == [9, 4, 9, 5, 6]
    (alone,) = made(maker(ranks=layout(tensor=4), **data), SAMPLES, SHARES)
    assert alone.input_ids.shape == ((2, 5) if data else (1, 6))


def test_bf16_on_the_cpu_has_few_lengths() -> None:
    (found,) = made(maker(dtype=torch.bfloat16), SAMPLES, SHARES)
    assert found.input_ids.tolist() == [[7, 8, 9, 4, 5, 6] + [0] * 58]
    check_tokens(found, rows=[2, 3, 2, 4, 5], response_ids=[4, 2, 5, 6, 2])
    ranks = layout(tensor=2)
    (found,) = made(maker(ranks=ranks, dtype=torch.bfloat16, sequence_parallel=True), SAMPLES, SHARES)
    assert found.num_tokens == 128


def test_transformer_engine_gets_the_borders_of_whole_sequences() -> None:
    (found,) = made(maker(transformer_engine=True), SAMPLES, SHARES)
    assert found.input_ids.tolist() == [[7, 8, 9, 5, 6, 7, 8, 9, 4]]
    assert found.attention is not None
    assert found.attention.cu_seqlens_q.tolist() == [0, 5, 9]
    assert (found.attention.max_seqlen_q, found.attention.qkv_format) == (5, "thd")
    (padded,) = made(maker(transformer_engine=True, micro_batch_size=2), SAMPLES, SHARES)
    assert padded.attention is None


def test_only_trained_tokens_have_a_row_and_what_stands_behind_the_last_is_not_computed() -> None:
    # The prompt, two tokens sampled, two given, one sampled, two given.
    several = dataclasses.replace(
        sample([7, 8, 9], [4, 5, 1, 1, 6, 3, 3], group_id=3, episode_id=7),
        trained=np.array([0, 0, 0, 1, 1, 0, 0, 1, 0, 0], np.bool_),
    )
    assert size_of(several) == SampleSize(
        num_tokens=10, prompt_length=3, input_length=7, num_trained=3, group_id=3, episode_id=7, temperature=1.0
    )
    for data in ({}, {"share_prompt_prefix": False}, {"micro_batch_size": 2}):
        (found,) = made(maker(**data), [several, FIRST], SHARES)
        flat = found.input_ids.flatten().tolist()
        assert [token for token in flat if token in (4, 5, 1, 6, 3)] == [4, 5, 1, 1, 4]
        assert found.response_ids.tolist() == [4, 5, 6, 4, 2]
        assert predicting_tokens(found) == [9, 4, 1, 9, 4]
        assert found.token_shares.tolist() == [0.125] * 3 + [0.25] * 2
        assert found.rollout_logprobs.tolist() == logprobs_of([4, 5, 6, 4, 2])


def test_tokens_of_a_sample_may_differ_in_their_advantages() -> None:
    uneven = dataclasses.replace(FIRST, advantages=np.array([0, 0, 0, 0.5, -2], np.float32))
    (found,) = made(maker(), [uneven], [1.0])
    assert found.advantages.tolist() == [0.5, -2.0]


def test_a_prompt_is_never_trained() -> None:
    with pytest.raises(ValueError, match="none that is trained; found 3 tokens, the first trained token at \\[2\\]"):
        size_of(dataclasses.replace(FIRST, trained=np.array([0, 0, 1, 1, 1], np.bool_)))
    with pytest.raises(ValueError, match="must have a token"):
        size_of(sample([], [3]))


@pytest.mark.parametrize("data", [{}, {"share_prompt_prefix": False}, {"micro_batch_size": 4}])
def test_each_token_says_which_answer_of_the_micro_batch_it_is_of(data: dict[str, Any]) -> None:
    again = sample([7, 8, 9], [1], group_id=3, episode_id=FIRST.episode_id)  # a second row of the first answer
    (found,) = made(maker(**data), [FIRST, SECOND, again], [0.1] * 3)
    of = {4: "first", 2: None, 5: "second", 6: "second", 1: "first"}
    ids = {of[token]: set() for token in (4, 5)}
    for token, sequence_id in zip(found.response_ids.tolist(), found.sequence_ids.tolist(), strict=True):
        if of[token]:
            ids[of[token]].add(sequence_id)
    assert sorted(map(sorted, ids.values())) == [[0], [1]]
    assert (found.num_sequences, found.sequence_ids.dtype) == (2, torch.int64)


@pytest.mark.parametrize("data", [{}, {"share_prompt_prefix": False}, {"micro_batch_size": 4}])
def test_samples_of_different_temperatures_are_in_different_micro_batches(data: dict[str, Any]) -> None:
    hot = dataclasses.replace(SECOND, temperature=1.5)
    found = made(maker(**data), [FIRST, hot, sample([3], [8], group_id=4)], [0.1] * 3)
    assert {each.temperature: sorted(each.response_ids.tolist()) for each in found} == {1.0: [2, 4, 8], 1.5: [2, 5, 6]}
    with pytest.raises(AssertionError, match=r"one temperature, got \[1.0, 1.5\]"):
        maker().make([FIRST, hot], [0.1] * 2)


def test_an_episode_that_would_be_cut_is_refused() -> None:
    again = dataclasses.replace(SECOND, episode_id=FIRST.episode_id)
    with pytest.raises(ValueError, match="has samples in several micro-batches"):
        made(maker(max_tokens_per_microbatch=5), [FIRST, again], SHARES)
