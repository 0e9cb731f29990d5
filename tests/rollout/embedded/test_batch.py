"""The arrays of a decode step, and of one that computes again what was drawn before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.rollout.embedded.parts import CPU, cache_of, decoder_of, job
from tests.samples import answer
from tests.tiny_models import make_model
from tests.weights.shapes import SHAPES
from xrl.rollout.embedded import BLOCK_SIZE, num_blocks
from xrl.rollout.embedded.batch import DecodeBatch, SamplingArrays, SequenceState, replay_arrays
from xrl.rollout.embedded.cache import KVCache
from xrl.rollout.embedded.sampler import uniforms
from xrl.rollout.embedded.scheduler import Scheduler


def test_a_job_tells_its_prompt_from_what_was_drawn() -> None:
    going_on = job(5, 6, 7, 21, 22, num_drawn=2, num_samples=3)
    assert (list(going_on.prompt), going_on.prompt_length) == ([5, 6, 7], 3)
    row = going_on.new_sequence(1)
    assert (row.sample, row.token_ids, row.logprobs, row.blocks) == (1, [21, 22], [], [])
    row.token_ids.append(23)
    assert going_on.new_sequence(2).token_ids == [21, 22]
    assert job(5, 6).new_sequence(0).token_ids == []


def test_a_job_is_done_with_its_last_sample_and_knows_nothing_after_a_restart() -> None:
    found = job(5, num_samples=2)
    found.num_started, found.prompt_blocks, found.last_hidden = 2, [3], torch.ones(1)
    found.completions[1] = answer(2)
    assert not found.is_done
    found.completions[0] = answer(3)
    assert found.is_done
    found.restart()
    assert not found.is_done
    assert (found.completions, found.num_started, found.prompt_blocks, found.last_hidden) == ({}, 0, [], None)


def test_a_row_needs_a_block_with_its_first_token_and_then_after_each_full_one() -> None:
    row = job(5).new_sequence(0)
    needing = []
    for length in range(1, 2 * BLOCK_SIZE + 2):
        row.token_ids.append(0)
        if row.needs_block:
            needing.append(length)
    assert needing == [1, BLOCK_SIZE + 1, 2 * BLOCK_SIZE + 1]


def test_each_row_samples_by_its_own_request() -> None:
    first = job(5, num_samples=2, temperature=0.5, top_k=3, seed=-7)
    second = job(6, top_p=0.25, seed=9, first_sample=40)
    rows = [first.new_sequence(0), first.new_sequence(1), second.new_sequence(0)]
    arrays = SamplingArrays(rows, CPU)
    assert arrays.temperatures.tolist() == [0.5, 0.5, 1.0]
    assert arrays.top_k.tolist() == [3, 3, 0]
    assert arrays.top_p.tolist() == [1.0, 1.0, 0.25]
    places = np.array([4, 0, 11])
    expected = uniforms(np.array([-7, -7, 9]), np.array([0, 1, 40]), places)
    assert arrays.uniforms(places).tolist() == expected.tolist()


def rows_of_two_jobs(cache: KVCache) -> list[SequenceState]:
    """Two rows of a prompt of 3 tokens, with 1 and 2 tokens drawn; one of a prompt of 20, with 17."""
    short = job(5, 6, 7, num_samples=2)
    long = job(*range(60, 80), max_new_tokens=40)
    short.prompt_blocks, long.prompt_blocks = cache.allocate(1), cache.allocate(2)
    return [
        SequenceState(job=short, sample=0, token_ids=[31]),
        SequenceState(job=short, sample=1, token_ids=[32, 33], blocks=cache.allocate(1)),
        SequenceState(job=long, sample=0, token_ids=list(range(40, 57)), blocks=cache.allocate(1)),
    ]


def test_a_step_gives_each_newest_token_its_place_and_its_context() -> None:
    cache = KVCache(SHAPES["qwen3"], torch.float32, CPU)
    rows = rows_of_two_jobs(cache)
    batch = DecodeBatch(rows, CPU)
    tokens, positions, slots, context = batch.prepare(cache)
    assert [len(row.blocks) for row in rows] == [1, 1, 2]  # two of the tokens begin a block
    assert tokens.tolist() == [31, 33, 56, 0]  # padded to one of few sizes
    assert positions.tolist() == [3, 4, 20 + 16, 0]
    places = [rows[0].blocks[0] * BLOCK_SIZE, rows[1].blocks[0] * BLOCK_SIZE + 1, rows[2].blocks[1] * BLOCK_SIZE]
    assert slots.tolist() == [*places, -1]
    assert len(set(places)) == 3
    assert context.group_starts.tolist() == [0, 2, 3, 4]
    assert context.prompt_lengths.tolist() == [3, 20, 0]
    assert context.row_lengths.tolist() == [1, 2, 17, 0]
    assert context.prompt_blocks[1].tolist() == rows[2].job.prompt_blocks
    assert context.row_blocks[2].tolist() == rows[2].blocks
    context.check(4, CPU)
    context.check_values(cache.num_blocks, BLOCK_SIZE)


def test_the_next_step_goes_on_from_there() -> None:
    cache = KVCache(SHAPES["qwen3"], torch.float32, CPU)
    rows = rows_of_two_jobs(cache)
    batch = DecodeBatch(rows, CPU)
    before = batch.prepare(cache)[2].tolist()  # in place: the next step changes it
    drawn_at = batch.uniforms()
    assert drawn_at.tolist() == batch.sampling.uniforms(np.array([1, 2, 17])).tolist()
    for row in rows:
        row.token_ids.append(90)
    batch.advance()
    tokens, positions, slots, context = batch.prepare(cache)
    assert tokens.tolist() == [90, 90, 90, 0]
    assert positions.tolist() == [4, 5, 37, 0]
    assert slots.tolist() == [*(slot + 1 for slot in before[:3]), -1]
    assert context.row_lengths.tolist() == [2, 3, 18, 0]
    assert [len(row.blocks) for row in rows] == [1, 1, 2]


def test_a_step_without_padding_has_no_group_for_it() -> None:
    cache = KVCache(SHAPES["qwen3"], torch.float32, CPU)
    rows = rows_of_two_jobs(cache)[:2]
    tokens, _, _, context = DecodeBatch(rows, CPU).prepare(cache)
    assert tokens.tolist() == [31, 33]
    assert context.group_starts.tolist() == [0, 2]
    context.check(2, CPU)


def test_what_was_drawn_is_replayed_a_token_a_row_each_behind_those_before_it() -> None:
    cache = KVCache(SHAPES["qwen3"], torch.float32, CPU)
    one = job(5, 6, 7)
    one.prompt_blocks = cache.allocate(1)
    two = job(8)
    two.prompt_blocks = cache.allocate(1)
    rows = [
        SequenceState(job=one, sample=0, token_ids=[31, 32, 33], blocks=cache.allocate(1)),
        SequenceState(job=two, sample=0, token_ids=list(range(40, 59)), blocks=cache.allocate(2)),
    ]
    tokens, positions, slots, context = replay_arrays(rows, CPU)
    assert tokens.tolist() == [31, 32, *range(40, 58), *[0] * 12]
    assert positions.tolist() == [3, 4, *range(1, 19), *[0] * 12]
    (mine,), (first, second) = (row.blocks for row in rows)
    theirs = [*(first * BLOCK_SIZE + place for place in range(16)), second * BLOCK_SIZE, second * BLOCK_SIZE + 1]
    assert slots.tolist() == [mine * BLOCK_SIZE, mine * BLOCK_SIZE + 1, *theirs, *[-1] * 12]
    assert context.row_lengths.tolist() == [1, 2, *range(1, 19), *[0] * 12]
    assert context.group_starts.tolist() == [0, 2, 20, 32]
    context.check(32, CPU)
    context.check_values(cache.num_blocks, BLOCK_SIZE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_keys_and_values_are_those_of_the_steps_to_the_bit(dtype: torch.dtype) -> None:
    decoder = decoder_of(make_model(num_hidden_layers=2), dtype)
    cache = cache_of(decoder)
    scheduler = Scheduler(decoder, cache, 8)
    scheduler.add(job(*range(5, 25), num_samples=3, max_new_tokens=40, seed=1))
    scheduler.add(job(7, max_new_tokens=40, seed=2))

    def written(row: SequenceState) -> list[Tensor]:
        """[tokens but the newest, heads, D] of keys and values of each layer."""
        return [
            part[row.blocks].transpose(1, 2).flatten(0, 1)[: len(row.token_ids) - 1].clone()
            for part in (*cache.keys, *cache.values)
        ]

    with torch.inference_mode():
        for _ in range(20):
            assert scheduler.step(0) == []
        rows = scheduler._running
        assert [len(row.token_ids) for row in rows] == [21] * 4
        before = list(map(written, rows))
        for row in rows:
            row.blocks = cache.allocate(num_blocks(len(row.token_ids) - 1))
        decoder.decode(*replay_arrays(rows, CPU), cache=cache)
    for row, expected in zip(rows, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(written(row), expected, strict=True))
