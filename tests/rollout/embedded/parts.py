"""Parts of the embedded engine by themselves, around a tiny model."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tests.rollout.engines import buckets, request
from xrl.models.checks import checked_shape
from xrl.models.shape import ModelShape
from xrl.rollout.embedded.batch import Job
from xrl.rollout.embedded.cache import KVCache
from xrl.rollout.embedded.model import Decoder
from xrl.rollout.embedded.weights import DecoderWeights

CPU = torch.device("cpu")
MAX_MODEL_LEN = 128


def shape_of(model: PreTrainedModel) -> ModelShape:
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return checked_shape(config, Path("config.json"))


def decoder_of(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Decoder:
    """With the model's weights."""
    weights = DecoderWeights(shape_of(model), dtype, CPU)
    for bucket in buckets(model):
        weights.load(bucket.tensors, version=0)
    weights.finish()
    return Decoder(weights.shape, weights, MAX_MODEL_LEN)


def cache_of(decoder: Decoder) -> KVCache:
    """An empty one, without a cap."""
    return KVCache(decoder.shape, decoder.weights.dtype, decoder.weights.device)


def job(*token_ids: int, **options: object) -> Job:
    """A request as the scheduler gets it; `options` are those of `request`."""
    return Job(request=request(list(token_ids), **options), future=Future())  # type: ignore[arg-type]
