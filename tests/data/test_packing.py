"""Micro-batch plans and packs: nothing lost, nothing twice, budgets kept."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.samples import response_of
from tests.samples import sample as make_sample
from xrl.data.packing import num_tokens, pack, pad, plan_microbatches, size_of
from xrl.types import Sample, SampleSize


def sample(group_id: int, prompt_length: int, response_length: int) -> Sample:
    return make_sample(
        [1 + 100 * group_id + place for place in range(prompt_length)],
        [10_000 + place for place in range(response_length)],
        group_id=group_id,
    )


def sizes_of(samples: list[Sample]) -> list[SampleSize]:
    return [size_of(each) for each in samples]


@st.composite
def batches(draw: st.DrawFn) -> list[Sample]:
    samples = []
    for group_id in range(draw(st.integers(1, 6))):
        prompt_length = draw(st.integers(1, 12))
        for _ in range(draw(st.integers(1, 5))):
            samples.append(sample(group_id, prompt_length, draw(st.integers(1, 20))))
    return samples


@given(batches(), st.integers(1, 4), st.integers(32, 200), st.booleans())
@settings(deadline=None)
def test_plan_uses_each_sample_once_within_the_budget_and_evenly(
    samples: list[Sample], num_replicas: int, max_tokens: int, share: bool
) -> None:
    plan = plan_microbatches(sizes_of(samples), num_replicas=num_replicas, max_tokens=max_tokens, share_prompts=share)
    assert len(plan) == num_replicas
    assert len({len(microbatches) for microbatches in plan}) == 1
    assert sorted(index for microbatches in plan for bin in microbatches for index in bin) == list(range(len(samples)))
    for microbatches in plan:
        for indices in microbatches:
            assert num_tokens(sizes_of(samples), indices, share_prompts=share) <= max_tokens


@given(batches(), st.integers(1, 4))
@settings(deadline=None)
def test_shared_pack_holds_each_prompt_once_and_predicts_every_response_token(
    samples: list[Sample], multiple: int
) -> None:
    packed = pack(samples, share_prompts=True, multiple=multiple)
    lengths = [n for c in packed.clusters for n in (*c.root_lengths, *c.branch_lengths)]
    assert 0 <= len(packed.token_ids) - sum(lengths) < multiple
    assert len(packed.token_ids) == len(packed.position_ids)
    assert len(packed.token_ids) % multiple == 0
    for sample_ in samples:
        last = sample_.token_ids[sample_.prompt_length - 1]
        assert packed.token_ids.tolist().count(last) == 1
    # Every response token is predicted from the place that holds the token before it.
    place = 0
    for index in packed.order:
        s = samples[index]
        for at in range(s.prompt_length, len(s.token_ids)):
            row = packed.rows[place]
            assert packed.targets[place] == s.token_ids[at]
            assert packed.token_ids[row] == s.token_ids[at - 1]
            assert packed.position_ids[row] == at - 1
            place += 1
    assert place == len(packed.rows)


def test_plain_pack_and_padded_batch_predict_the_same_tokens() -> None:
    samples = [sample(0, 3, 4), sample(0, 3, 1), sample(1, 5, 2)]
    for made in (pack(samples, share_prompts=False), pad(samples)):
        assert sorted(made.targets.tolist()) == sorted(t for s in samples for t in response_of(s))
        for index, row in zip(
            np.repeat(made.order, [len(response_of(samples[i])) for i in made.order]), made.rows, strict=True
        ):
            assert made.token_ids[row] in samples[index].token_ids
    assert pad(samples, multiple=4).padded_shape == (3, 8)


def test_replica_without_samples_gets_an_empty_pack_that_still_runs() -> None:
    plan = plan_microbatches(sizes_of([sample(0, 3, 4)]), num_replicas=2, max_tokens=100, share_prompts=True)
    empty = next(indices for microbatches in plan for indices in microbatches if not indices)
    assert empty == []
    made = pack([], share_prompts=True, multiple=2)
    assert made.rows.tolist() == []
    assert len(made.token_ids) == 2


def test_fixed_size_microbatches_are_dealt_evenly() -> None:
    samples = [sample(i, 2, 2) for i in range(8)]
    plan = plan_microbatches(
        sizes_of(samples), num_replicas=2, max_tokens=1, share_prompts=False, samples_per_microbatch=2
    )
    assert [[len(indices) for indices in microbatches] for microbatches in plan] == [[2, 2], [2, 2]]
