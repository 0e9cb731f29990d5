"""What tests of engines share: weight updates and requests."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

from xrl.rollout.engine import Engine
from xrl.types import Completion, GenerateRequest, SamplingParams, WeightBucket


def buckets(model: PreTrainedModel, version: int = 0) -> list[WeightBucket]:
    """The model's tensors as the actor pushes them."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in checkpoint_tensors(model):
        if name.startswith("model.layers."):
            part = "layers." + name.split(".")[2]
        else:
            part = "embeddings" if "embed_tokens" in name else "final"
        parts.setdefault(part, {})[name] = tensor
    return [WeightBucket(version=version, part=part, tensors=tensors) for part, tensors in parts.items()]


def checkpoint_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as checkpoints hold them, where transformers joins all experts of a layer in memory."""
    for name, parameter in model.named_parameters():
        prefix, _, kind = name.rpartition(".")
        for expert, weight in enumerate(parameter.detach()) if prefix.endswith(".experts") else ():
            if kind == "gate_up_proj":
                gate, up = weight.chunk(2)
                yield f"{prefix}.{expert}.gate_proj.weight", gate
                yield f"{prefix}.{expert}.up_proj.weight", up
            else:
                yield f"{prefix}.{expert}.{kind}.weight", weight
        if not prefix.endswith(".experts"):
            yield name, parameter.detach()


def push(engine: Engine, model: PreTrainedModel, version: int = 0) -> None:
    """One whole weight update."""
    for bucket in buckets(model, version):
        engine.load_part(bucket)
    engine.finish_update(version)


def request(
    token_ids: list[int],
    *,
    id: str = "a",
    num_samples: int = 1,
    first_sample: int = 0,
    num_drawn: int = 0,
    **sampling: object,
) -> GenerateRequest:
    """A request; `sampling` are fields of SamplingParams, max_new_tokens is 16 unless given."""
    params = SamplingParams(**({"max_new_tokens": 16} | sampling))  # type: ignore[arg-type]
    return GenerateRequest(
        id=id,
        token_ids=token_ids,
        num_samples=num_samples,
        sampling=params,
        first_sample=first_sample,
        num_drawn=num_drawn,
    )


def generate(engine: Engine, token_ids: list[int], **options: object) -> list[Completion]:
    """One request's completions; `options` are those of `request`."""
    return engine.submit(request(token_ids, **options)).result(timeout=60)  # type: ignore[arg-type]
