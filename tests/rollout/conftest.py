"""Tiny random checkpoints and engines for the rollout tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from xrl.rollout import create_engine
from xrl.rollout.engine import Engine
from xrl.types import WeightBucket

VOCAB_SIZE = 97


def tiny_model(family: str = "qwen3", *, tied: bool = True, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> PreTrainedModel:
    """A random two-layer model with grouped-query attention, in eval mode."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    model: PreTrainedModel
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16))
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():  # sharp enough for greedy decoding to be unambiguous, with norms and biases that matter
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    return model.eval()


def buckets(model: PreTrainedModel, version: int) -> list[WeightBucket]:
    """The model's tensors as the actor pushes them."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("model.layers."):
            part = "layers." + name.split(".")[2]
        else:
            part = "embeddings" if "embed_tokens" in name else "final"
        parts.setdefault(part, {})[name] = parameter.detach()
    return [WeightBucket(version=version, layer=part, tensors=tensors) for part, tensors in parts.items()]


def push(engine: Engine, model: PreTrainedModel, version: int = 0) -> None:
    """One whole weight update."""
    for bucket in buckets(model, version):
        engine.load_layer(bucket)
    engine.finish_update(version)


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Build engines for a model's shape, with its weights unless `load=False`; all are closed afterwards."""
    engines: list[Engine] = []

    def make(model: PreTrainedModel, *, load: bool = True, max_batch_size: int = 64, dtype: str = "float32") -> Engine:
        model.config.save_pretrained(tmp_path)
        engine = create_engine(
            "embedded",
            model_dir=tmp_path,
            dtype=dtype,
            device="cpu",
            max_batch_size=max_batch_size,
            num_threads=1,
            max_model_len=128,
        )
        engines.append(engine)
        if load:
            push(engine, model)
        return engine

    yield make
    for engine in engines:
        engine.close()
