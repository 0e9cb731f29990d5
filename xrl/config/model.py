"""Which model, and how its layers are computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_type_hints

from xrl.config.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The Hugging Face checkpoint and the numerics of its layers."""

    model: Path
    """Hugging Face folder to start from (config.json, tokenizer, safetensors)."""

    bf16: bool | None = None
    """Train in bf16 with fp32 main weights; default: yes on CUDA, no (fp32) on CPU."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers: transformer-engine's, or our own (local); auto takes transformer-engine on CUDA when installed."""

    kernel_backend: Literal["auto", "reference", "native", "triton"] = "auto"
    """What computes log-probs and loss: plain PyTorch (reference), compiled kernels (native) or Triton; auto takes the
    fastest that runs, or what XRL_KERNEL_BACKEND says."""

    fused_linear_logprob: bool = False
    """Compute log-probs and loss from hidden states, a chunk of rows at a time, so that the logits are never held
    whole: less memory where the vocabulary is large."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: whole layers (full) or core attention only (selective); default:
    nothing."""

    recompute_num_layers: int = 1
    """With full recompute: layers between two kept activations."""

    def __post_init__(self) -> None:
        if self.recompute_num_layers < 1:
            raise SettingsError(f"--recompute-num-layers must be >= 1, got {self.recompute_num_layers}")


KERNEL_BACKENDS: tuple[str, ...] = get_args(get_type_hints(ModelConfig)["kernel_backend"])
