"""Each rule's load and export are inverse to each other, bit for bit, at every tensor-parallel size."""

from __future__ import annotations

import pytest
import torch

from xrl.weights.mapping import GateUp, Mapping, QueryKeyValue, Rank, Replicated, RowParallel, Vocabulary

HIDDEN = 6


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "norm": make(HIDDEN),
        "o": make(HIDDEN, 24),
        "embed": make(13, HIDDEN),
        "q": make(24, HIDDEN),
        "k": make(12, HIDDEN),
        "v": make(12, HIDDEN),
        "q_bias": make(24),
        "k_bias": make(12),
        "v_bias": make(12),
        "gate": make(8, HIDDEN),
        "up": make(8, HIDDEN),
    }


RULES: dict[str, Mapping] = {
    "replicated": Replicated("norm", HIDDEN),
    "row": RowParallel("o", 24),
    "vocabulary that does not divide": Vocabulary("embed", 13),
    "qkv": QueryKeyValue("q", "k", "v", num_heads=8, num_kv_heads=4, head_dim=3),
    "qkv bias": QueryKeyValue("q_bias", "k_bias", "v_bias", num_heads=8, num_kv_heads=4, head_dim=3),
    "gate and up": GateUp("gate", "up", 8),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("rule", RULES)
def test_load_then_export_gives_the_same_tensors(rule: str, size: int) -> None:
    source = tensors()
    mapping = RULES[rule]

    def read(name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        return source[name].narrow(dim, start, stop - start)

    shards = [mapping.load(read, Rank(index, size)) for index in range(size)]
    assert len({shard.shape for shard in shards}) == 1
    exported = mapping.export(shards if mapping.is_sharded else shards[:1])
    assert set(exported) == set(mapping.names)
    for name, tensor in exported.items():
        assert torch.equal(tensor, source[name])


def test_qkv_keeps_each_key_head_beside_its_query_heads() -> None:
    source = {
        "q": torch.arange(8.0)[:, None],
        "k": torch.arange(100.0, 102)[:, None],
        "v": torch.arange(200.0, 202)[:, None],
    }
    rule = QueryKeyValue("q", "k", "v", num_heads=8, num_kv_heads=2, head_dim=1)
    whole = rule.load(lambda name, dim, start, stop: source[name][start:stop], Rank(0, 1))
    assert whole[:, 0].tolist() == [0, 1, 2, 3, 100, 200, 4, 5, 6, 7, 101, 201]
