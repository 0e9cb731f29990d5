"""The decoder's weights: Hugging Face tensors in, one layer at a time; packed matrices out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xrl.kernels.decode.packed_linear import PackedLinear, PackedSwiGLU
from xrl.models.shape import ExpertShape, ModelShape
from xrl.rollout.embedded.mlp import Experts, GatedMLP
from xrl.rollout.engine import WrongWeights
from xrl.weights.plan import EMBEDDINGS, FINAL, part_names, tensor_shapes

EMBEDDING = "model.embed_tokens.weight"


@dataclass(kw_only=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: Tensor  # [H]
    qkv: PackedLinear  # queries, keys and values in one product
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    attention_out: PackedLinear
    mlp_norm: Tensor  # [H]
    mlp: GatedMLP | Experts


class DecoderWeights:
    """The weights in use, and what has arrived of the next update.

    A part is installed as soon as its last tensor arrives, so an update needs the memory of one part more than
    the model, never of a second model.
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.embedding: Tensor = torch.empty(0)
        self.layers: dict[int, LayerWeights] = {}
        self.final_norm: Tensor = torch.empty(0)
        self.head: PackedLinear | None = None
        self._expected = {part: tensor_shapes(shape, part) for part in part_names(shape)}
        self._part_of = {name: part for part, tensors in self._expected.items() for name in tensors}
        self._arrived: dict[str, dict[str, Tensor]] = {}  # of parts not yet complete
        self._installed: set[str] = set()  # parts of the update under way
        self._version: int | None = None  # of the update under way

    def check(self, tensors: Mapping[str, Tensor], *, source: str) -> None:
        """Refuse tensors that the model does not have.

        Raises:
            WrongWeights: a name the model does not have, or a wrong size; `source` is named in the message.
        """
        for name, tensor in tensors.items():
            if name not in self._part_of:
                raise WrongWeights(f"weight update, {source}: the model has no tensor {name!r}")
            expected = self._expected[self._part_of[name]][name]
            if tuple(tensor.shape) != expected:
                raise WrongWeights(
                    f"weight update, {source}: {name} must be of size {list(expected)}, got {list(tensor.shape)}"
                )

    def load(self, tensors: Mapping[str, Tensor], *, version: int) -> None:
        """Take whole tensors that were checked; their memory may be reused once this returns.

        Another version than that of the tensors before starts a new update.
        """
        if version != self._version:
            self._version = version
            self._arrived.clear()
            self._installed.clear()
        for name, tensor in tensors.items():
            self._arrived.setdefault(self._part_of[name], {})[name] = tensor
        for part in {self._part_of[name] for name in tensors}:
            if len(self._arrived[part]) == len(self._expected[part]):
                self._install(part, self._arrived.pop(part))
                self._installed.add(part)
            else:
                self._arrived[part] = {name: tensor.clone() for name, tensor in self._arrived[part].items()}

    def destinations(self, part: str) -> dict[str, Tensor]:
        """Memory of tensors that are kept as they arrive: the embeddings, on the CPU."""
        if part != EMBEDDINGS or self.device.type != "cpu":
            return {}
        shape = self._expected[EMBEDDINGS][EMBEDDING]
        if self.embedding.shape != shape:
            self.embedding = torch.empty(shape, dtype=self.dtype)
        return {EMBEDDING: self.embedding}

    def finish(self) -> None:
        """Close an update.

        Raises:
            WrongWeights: naming the tensors that have not arrived; the update stays open.
        """
        missing = [
            name
            for part, tensors in self._expected.items()
            if part not in self._installed
            for name in tensors
            if name not in self._arrived.get(part, {})
        ]
        if missing:
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise WrongWeights(f"weight update is incomplete: missing {shown}")
        self._installed.clear()
        self._version = None

    def offload(self) -> None:
        """Move the weights out of accelerator memory; on CPU there is nothing to gain."""
        if self.device.type != "cpu":
            self._move(torch.device("cpu"))

    def restore(self) -> None:
        """Undo `offload`."""
        if self.device.type != "cpu":
            self._move(self.device)

    def clear(self) -> None:
        """Free everything."""
        self.embedding = self.final_norm = torch.empty(0)
        self.head = None
        self.layers.clear()
        self._arrived.clear()
        self._installed.clear()

    def _move(self, device: torch.device) -> None:
        self.embedding, self.final_norm = self.embedding.to(device), self.final_norm.to(device)
        if self.head is not None:
            self.head = PackedLinear(self.embedding) if self.shape.tied_embeddings else self.head.to(device)
        for layer in self.layers.values():
            for name, value in vars(layer).items():
                setattr(layer, name, None if value is None else value.to(device))

    def _install(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        if part == EMBEDDINGS:
            # It is there already where it was copied to its destination.
            if tensors[EMBEDDING].data_ptr() != self.embedding.data_ptr():
                self.embedding = self._copy(tensors[EMBEDDING])
            if self.shape.tied_embeddings:
                self.head = PackedLinear(self.embedding)
        elif part == FINAL:
            self.final_norm = self._copy(tensors["model.norm.weight"])
            if not self.shape.tied_embeddings:
                self.head = PackedLinear(self._copy(tensors["lm_head.weight"]))
        else:
            index = int(part.removeprefix("layers."))
            self.layers[index] = self._layer({name.split(".", 3)[3]: tensor for name, tensor in tensors.items()})

    def _layer(self, tensors: Mapping[str, Tensor]) -> LayerWeights:
        def vector(name: str) -> Tensor | None:
            return self._copy(tensors[name]) if name in tensors else None

        def joined(names: tuple[str, ...], kind: str) -> Tensor:
            return torch.cat([tensors[f"{name}.{kind}"].to(self.device, self.dtype) for name in names])

        def weight_and_bias(*names: str) -> tuple[Tensor, Tensor | None]:
            has_bias = f"{names[0]}.bias" in tensors
            return joined(names, "weight"), joined(names, "bias") if has_bias else None

        def linear(*names: str) -> PackedLinear:
            return PackedLinear(*weight_and_bias(*names))

        def gated_mlp(prefix: str) -> GatedMLP:
            gate_up = PackedSwiGLU(*weight_and_bias(f"{prefix}.gate_proj", f"{prefix}.up_proj"))
            return GatedMLP(gate_up=gate_up, down=linear(f"{prefix}.down_proj"))

        def experts(shape: ExpertShape) -> Experts:
            mlps = [gated_mlp(f"mlp.experts.{expert}") for expert in range(shape.num_experts)]
            return Experts(shape, self._copy(tensors["mlp.gate.weight"]), mlps)

        return LayerWeights(
            input_norm=self._copy(tensors["input_layernorm.weight"]),
            qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            q_norm=vector("self_attn.q_norm.weight"),
            k_norm=vector("self_attn.k_norm.weight"),
            attention_out=linear("self_attn.o_proj"),
            mlp_norm=self._copy(tensors["post_attention_layernorm.weight"]),
            mlp=experts(self.shape.experts) if self.shape.experts else gated_mlp("mlp"),
        )

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.dtype, copy=True)
