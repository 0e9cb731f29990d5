"""megatron-core's self-attention with everything between its two products in our own kernels, where there are some."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer import attention as megatron
from torch import Tensor

from xrl.kernels.layers.self_attention import HeadSettings, self_attention
from xrl.models.packed import AttentionInputs


class SelfAttention(megatron.SelfAttention):
    """megatron-core's self-attention by our kernels; without them its own way, through `PackedAttention`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        packed_seq_params: AttentionInputs | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[S, B, H] -> [S, B, H] and the projection's bias, which these models do not have."""
        inputs = packed_seq_params
        if inputs is None or inputs.sequences is None or inputs.cos is None or inputs.sin is None:
            output: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs
            )
            return output
        mixed, _ = self.linear_qkv(hidden_states)
        settings = HeadSettings(
            cos=inputs.cos,
            sin=inputs.sin,
            # Without QK norm the modules are identities, which have no weight.
            q_weight=getattr(self.q_layernorm, "weight", None),
            k_weight=getattr(self.k_layernorm, "weight", None),
            eps=self.config.layernorm_epsilon,
            scale=self.core_attention.scale,
        )
        out = self_attention(
            mixed.flatten(0, 1), inputs.sequences, settings, num_kv_heads=self.num_query_groups_per_partition
        )
        projected: tuple[Tensor, Tensor | None] = self.linear_proj(out.view(*mixed.shape[:2], -1))
        return projected
