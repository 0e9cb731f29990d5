"""The words of a mapping table: which Hugging Face tensors a Megatron parameter is made of, and how ranks share it.

A table is data; `plan.py` does the arithmetic, in both directions. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from xrl.models.shape import ModelShape


class Cut(Enum):
    """How tensor-parallel ranks share a parameter, and how several tensors lie in it."""

    WHOLE = "every rank holds all of it"
    OUTPUTS = "along dimension 0; of several tensors (gate, up) each rank holds its part of one below that of the other"
    INPUTS = "along dimension 1"
    HEADS = "along dimension 0 by key/value heads: for each its query heads, its key head, its value head"
    VOCABULARY = "along dimension 0, which zero rows make divisible"


@dataclass(frozen=True)
class WeightMapping:
    """One line of a table: a Megatron parameter and the Hugging Face tensors it holds.

    Names are those within a decoder layer; with `{expert}` in them the mapping stands for every expert.
    """

    megatron: str
    cut: Cut
    tensors: Mapping[str, tuple[str, ...]]
    """Hugging Face name -> shape, in the words of `sizes`."""

    te_name: str | None = None
    """The parameter's other name, in transformer-engine's layers: they keep a norm inside the linear layer that follows
    it, and the weights of all experts in one module."""

    when: Callable[[ModelShape], bool] | None = None
    """Which models have it; None: all."""

    te_cut: Cut | None = None
    """How transformer-engine's layers cut it, where that differs."""

    is_copy: bool = False
    """Holds what another parameter holds: loaded, but not exported."""

    keeps_dtype: bool = False
    """Stays in its own number format (fp32), whatever the weights are exported in."""

    def cut_in(self, *, transformer_engine: bool) -> Cut:
        """How the layers cut the parameter."""
        return self.te_cut if transformer_engine and self.te_cut is not None else self.cut


WeightMappings = tuple[WeightMapping, ...]


@dataclass(frozen=True, kw_only=True)
class WeightTable:
    """All parameters of a family."""

    layer: WeightMappings  # in every decoder layer
    dense: WeightMappings  # in layers with a plain MLP
    sparse: WeightMappings = ()  # in layers with experts
    embeddings: WeightMappings
    final: WeightMappings
    layer_prefix: str = "model.layers.{layer}."  # of Hugging Face names within a layer

    def layer_mappings(self, shape: ModelShape, layer: int) -> list[WeightMapping]:
        """The mappings of one decoder layer."""
        return _applicable((*self.layer, *(self.sparse if shape.has_experts(layer) else self.dense)), shape)

    def embedding_mappings(self, shape: ModelShape) -> list[WeightMapping]:
        """The mappings before the first layer."""
        return _applicable(self.embeddings, shape)

    def final_mappings(self, shape: ModelShape) -> list[WeightMapping]:
        """The mappings after the last layer."""
        return _applicable(self.final, shape)


def _applicable(mappings: WeightMappings, shape: ModelShape) -> list[WeightMapping]:
    return [mapping for mapping in mappings if mapping.when is None or mapping.when(shape)]


def sizes(shape: ModelShape) -> dict[str, int]:
    """The words that tables use for the lengths of dimensions."""
    words = {
        "hidden": shape.hidden_size,
        "vocabulary": shape.vocab_size,
        "queries": shape.num_heads * shape.head_dim,
        "keys": shape.num_kv_heads * shape.head_dim,
        "head": shape.head_dim,
        "ffn": shape.ffn_hidden_size,
    }
    if shape.experts is not None:
        words |= {
            "one": 1,
            "experts": shape.experts.num_experts,
            "expert_ffn": shape.experts.ffn_hidden_size,
            "shared_ffn": shape.experts.shared_ffn_hidden_size,
        }
    if shape.latent is not None:
        latent = shape.latent
        words |= {
            "query_rank": latent.q_lora_rank or 0,
            "kv_rank": latent.kv_lora_rank,
            "kv_rank_and_rope": latent.kv_lora_rank + latent.qk_rope_head_dim,
            "latent_queries": shape.num_heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim),
            "latent_keys_values": shape.num_heads * (latent.qk_nope_head_dim + latent.v_head_dim),
            "latent_values": shape.num_heads * latent.v_head_dim,
        }
    return words
