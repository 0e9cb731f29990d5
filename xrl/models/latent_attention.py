"""DeepSeek's multi-head latent attention (arXiv:2405.04434) around our own packed attention.

Shapes: T tokens of a pack, or S x B of padded rows; n heads of this tensor rank; a head's query and key have a plain
part and a rotated one, whose key all heads share.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import multi_latent_attention as megatron
from torch import Tensor

from xrl.kernels.layers.layer_ops import rotary
from xrl.models.packed import AttentionInputs

# transformers gives these two norms its default, whatever config.json says of the others.
LATENT_NORM_EPS = 1e-6

# megatron-core 0.16 takes transformer-engine for installed where it is not, and then asks for its layers' type.
if not isinstance(megatron.TELinear, type):
    megatron.HAVE_TE = False


class LatentAttention(megatron.MLASelfAttention):
    """megatron-core's parameters, with our positions and packing.

    megatron-core's own forward knows no sequence that continues another one, and loses a part of the gradient of the
    shared rotated key when tensor ranks hold different heads.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kv_layernorm.eps = LATENT_NORM_EPS
        if self.config.q_lora_rank is not None:
            self.q_layernorm.eps = LATENT_NORM_EPS

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """What the layer spec says: later versions of megatron-core ask here, and would want transformer-engine's."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        packed_seq_params: AttentionInputs | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """[S, B, H] -> [S, B, H] and no bias; under sequence parallelism each rank has its share of the S."""
        inputs = packed_seq_params
        assert inputs is not None and inputs.cos is not None and inputs.sin is not None
        query = self._queries(hidden_states)
        latents, rotated_key = self._latents(hidden_states)
        keys_and_values, _ = self.linear_kv_up_proj(latents)
        plain, turned, value_dim = self.config.qk_head_dim, self.config.qk_pos_emb_head_dim, self.config.v_head_dim
        heads = keys_and_values.unflatten(-1, (-1, plain + value_dim))  # [S, B, n, plain + value]
        key, value = heads.split([plain, value_dim], dim=-1)

        cos, sin = inputs.cos, inputs.sin
        plain_query, turned_query = query.split([plain, turned], dim=-1)
        query = torch.cat([plain_query, _turn(turned_query, cos, sin)], dim=-1)
        shared_key = _turn(rotated_key.unsqueeze(2), cos, sin).expand(-1, -1, key.shape[2], -1)
        key = torch.cat([key, shared_key], dim=-1)
        out = self._attend(query, key, value, inputs)
        projected: tuple[Tensor, None] = self.linear_proj(out.reshape(*query.shape[:2], -1))
        return projected

    def _queries(self, x: Tensor) -> Tensor:
        """[S, B, n, plain + rotated]"""
        if self.config.q_lora_rank is None:
            queries, _ = self.linear_q_proj(x)
        else:
            latents = self.q_layernorm(self._spread(self._down(self.linear_q_down_proj, x)))
            queries, _ = self.linear_q_up_proj(latents)
        heads: Tensor = queries.unflatten(-1, (-1, self.q_head_dim))
        return heads

    def _latents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of keys and values, normalised, and the rotated part of all keys [S, B, rotated]."""
        both = self._down(self.linear_kv_down_proj, x)
        latents, rotated_key = both.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        if self.tp_group.size() > 1:
            # Each rank's heads give this key a part of its gradient.
            rotated_key = tensor_parallel.copy_to_tensor_model_parallel_region(rotated_key, group=self.tp_group)
        return self.kv_layernorm(self._spread(latents)), rotated_key

    def _down(self, projection: torch.nn.Module, x: Tensor) -> Tensor:
        """A projection of the whole sequence, whose outputs are cut over the tensor ranks, whole on each."""
        out, _ = projection(x)
        if self.tp_group.size() > 1:
            out = tensor_parallel.gather_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out

    def _spread(self, x: Tensor) -> Tensor:
        """This rank's share of the sequence, where ranks share it: what the next projection takes."""
        if not self.config.sequence_parallel:
            return x
        return tensor_parallel.scatter_to_sequence_parallel_region(x, group=self.tp_group)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        if inputs.clusters is not None:  # [T, 1, n, *] -> [T, n, *]
            query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = self.core_attention.attend(query, key, value, inputs)
            return out

        if self.checkpoint_core_attention and self.training:
            out: Tensor = tensor_parallel.checkpoint(attend, False, query, key, value)
            return out
        return attend(query, key, value)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs, as DeepSeek has them; in the result all firsts stand before all seconds.

    Queries and keys are reordered alike, which their product does not notice.

    Args:
        x: [S, B, n, d]
        cos, sin: [S, d]
    """
    return rotary(torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1), cos, sin)
