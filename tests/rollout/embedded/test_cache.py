"""The KV cache: blocks that are taken and given back, growth that keeps what is written, and the cap."""

from __future__ import annotations

import pytest
import torch

from tests.rollout.embedded.parts import CPU
from tests.weights.shapes import SHAPES
from xrl.kernels.native import native_module
from xrl.rollout.embedded import BLOCK_SIZE, bytes_per_block
from xrl.rollout.embedded import cache as cache_module
from xrl.rollout.embedded.cache import KVCache

SHAPE = SHAPES["qwen3"]


def cache(**options: int) -> KVCache:
    return KVCache(SHAPE, torch.float32, CPU, **options)


def write(found: KVCache, block: int) -> None:
    """Its own number, and that of the layer."""
    for layer in range(SHAPE.num_layers):
        found.keys[layer][block] = 100 * layer + block
        found.values[layer][block] = -100 * layer - block


def is_written(found: KVCache, block: int) -> bool:
    return all(
        bool((found.keys[layer][block] == 100 * layer + block).all())
        and bool((found.values[layer][block] == -100 * layer - block).all())
        for layer in range(SHAPE.num_layers)
    )


def test_it_takes_no_memory_until_a_block_is_taken() -> None:
    found = cache()
    assert (found.num_blocks, found.num_used_blocks) == (0, 0)
    assert all(each.numel() == 0 for each in (*found.keys, *found.values))
    found.allocate(1)
    assert (found.num_blocks, found.num_used_blocks) == (1, 1)
    size = (1, SHAPE.num_kv_heads, BLOCK_SIZE, SHAPE.head_dim)
    assert [each.shape for each in (*found.keys, *found.values)] == [size] * 2 * SHAPE.num_layers
    assert sum(each.nbytes for each in (*found.keys, *found.values)) == found.bytes_per_block
    assert found.bytes_per_block == bytes_per_block(SHAPE, 4)


def test_no_block_is_handed_out_twice() -> None:
    found = cache()
    taken = [found.allocate(count) for count in (3, 1, 0, 9, 2)]
    assert list(map(len, taken)) == [3, 1, 0, 9, 2]
    blocks = [block for each in taken for block in each]
    assert len(set(blocks)) == len(blocks) == found.num_used_blocks
    assert max(blocks) < found.num_blocks


def test_blocks_that_were_given_back_come_first_and_the_lowest_of_them_before_the_others() -> None:
    found = cache()
    found.reserve(8)
    blocks = found.allocate(5)
    found.free([blocks[3], blocks[1]])
    assert found.num_used_blocks == 3
    assert found.allocate(3) == [1, 3, 5]
    assert found.num_blocks == 8


def test_it_doubles_where_it_has_too_few_and_no_sooner() -> None:
    found = cache()
    sizes = []
    for _ in range(9):
        found.allocate(1)
        sizes.append(found.num_blocks)
    assert sizes == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    found.allocate(40)  # more than twice as many
    assert found.num_blocks >= 49


def test_what_is_written_stays_when_it_grows() -> None:
    found = cache()
    blocks = found.allocate(3)
    for block in blocks:
        write(found, block)
    found.allocate(50)
    found.reserve(200)
    assert all(is_written(found, block) for block in blocks)


@pytest.mark.skipif(native_module() is None, reason="xrl._C is not built")
def test_what_is_written_stays_when_memory_is_put_behind_more_blocks() -> None:
    found = cache()
    found.reserve(10_000)  # more than two large pages hold
    first = found.allocate(3)
    for block in first:
        write(found, block)
    later = found.allocate(8000)
    write(found, later[-1])
    assert all(is_written(found, block) for block in (*first, later[-1]))
    assert not found.keys[0][later[-2]].any()


def test_room_is_reserved_for_blocks_beyond_those_that_are_free() -> None:
    found = cache()
    found.reserve(4)
    assert (found.num_blocks, found.num_used_blocks) == (4, 0)
    found.allocate(1)
    found.reserve(3)  # so many are free
    assert found.num_blocks == 4
    found.reserve(5)
    assert found.num_blocks == 6


def test_no_more_is_reserved_than_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_RESERVE_BYTES", 7 * bytes_per_block(SHAPE, 4) + 1)
    found = cache()
    found.reserve(1000)
    assert found.num_blocks == 7
    found.reserve(2000)
    assert found.num_blocks == 7
    assert len(found.allocate(30)) == 30  # what is needed is had all the same


def test_it_never_grows_beyond_its_cap_and_has_all_blocks_up_to_it() -> None:
    found = cache(max_blocks=11)
    found.reserve(1000)
    assert (found.num_blocks, found.num_available_blocks) == (11, 11)
    found = cache(max_blocks=11)
    for left in reversed(range(11)):
        found.allocate(1)
        assert found.num_available_blocks == left
    assert found.num_blocks == 11
    with pytest.raises(AssertionError):
        found.allocate(1)
    found.free([7])
    assert found.num_available_blocks == 1 and found.allocate(1) == [7]


def test_memory_is_zero_where_nothing_was_written() -> None:
    found = KVCache(SHAPE, torch.bfloat16, CPU)
    found.allocate(20)
    assert {each.dtype for each in (*found.keys, *found.values)} == {torch.bfloat16}
    assert not any(each.any() for each in (*found.keys, *found.values))
