"""What tests of engines share: weight updates and requests."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from xrl.rollout.engine import Engine
from xrl.types import Completion, GenerateRequest, SamplingParams, WeightBucket


def buckets(model: PreTrainedModel, version: int = 0) -> list[WeightBucket]:
    """The model's tensors as the actor pushes them."""
    parts: dict[str, dict[str, Tensor]] = {}
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


def request(token_ids: list[int], *, id: str = "a", num_samples: int = 1, **sampling: object) -> GenerateRequest:
    """A request; `sampling` are fields of SamplingParams, max_new_tokens is 16 unless given."""
    params = SamplingParams(**({"max_new_tokens": 16} | sampling))  # type: ignore[arg-type]
    return GenerateRequest(id=id, token_ids=token_ids, num_samples=num_samples, sampling=params)


def generate(engine: Engine, token_ids: list[int], **options: object) -> list[Completion]:
    """One request's completions; `options` are those of `request`."""
    return engine.submit(request(token_ids, **options)).result(timeout=60)  # type: ignore[arg-type]
