"""megatron-core's decoder layer as one operation, where we have a kernel for it."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from xrl.kernels.layers.train_layer import LayerInputs, LayerParameters, has_train_layer, train_layer
from xrl.models.mlp import GatedMLP
from xrl.models.norm import RMSNorm
from xrl.models.packed import AttentionInputs
from xrl.models.self_attention import SelfAttention


class DecoderLayer(TransformerLayer):
    """megatron-core's layer as one operation; its own way on several tensor ranks, and where there is no such kernel.

    It stands for layers that `kernels/layers/choice.py` finds to consist of the modules below.
    """

    input_layernorm: RMSNorm
    self_attention: SelfAttention
    pre_mlp_layernorm: RMSNorm
    mlp: GatedMLP

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: AttentionInputs | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[S, B, H] -> [S, B, H], and no context."""
        inputs = None if packed_seq_params is None else self._layer_inputs(packed_seq_params)
        if inputs is not None:
            parameters = self._layer_parameters()
            if has_train_layer(hidden_states, parameters, inputs):
                return train_layer(hidden_states, parameters, inputs), None
        output: tuple[Tensor, Tensor | None] = super().forward(
            hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        return output

    def _layer_inputs(self, packed: AttentionInputs) -> LayerInputs | None:
        if packed.sequences is None or packed.cos is None or packed.sin is None:
            return None
        attention = self.self_attention
        if attention.linear_proj.tp_group.size() > 1:
            return None
        return LayerInputs(
            sequences=packed.sequences,
            cos=packed.cos,
            sin=packed.sin,
            num_kv_heads=attention.num_query_groups_per_partition,
            eps=self.config.layernorm_epsilon,
            scale=attention.core_attention.scale,
        )

    def _layer_parameters(self) -> LayerParameters:
        attention = self.self_attention
        return LayerParameters(
            input_norm=self.input_layernorm.weight,
            qkv=attention.linear_qkv.weight,
            qkv_bias=attention.linear_qkv.bias,
            # Without QK norm the modules are identities, which have no weight.
            q_norm=getattr(attention.q_layernorm, "weight", None),
            k_norm=getattr(attention.k_layernorm, "weight", None),
            attention_out=attention.linear_proj.weight,
            mlp_norm=self.pre_mlp_layernorm.weight,
            gate_up=self.mlp.linear_fc1.weight,
            down=self.mlp.linear_fc2.weight,
        )
