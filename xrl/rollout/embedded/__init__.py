"""The embedded engine: a batched decoder on CPU and CUDA, in this process, for most families.

engine.py     the engine contract: requests in, futures out, a thread that steps
scheduler.py  who runs: requests waiting, samples running, blocks handed out and returned
batch.py      the arrays of one decode step
model.py      the forward pass: prefill and decode
mlp.py        its MLPs: gated ones, and mixtures of them
weights.py    Hugging Face tensors -> packed weights, a layer at a time
cache.py      the paged KV cache
cache_size.py how much memory that may take
sampler.py    tokens and log-probs from logits
"""

from __future__ import annotations

from xrl.models.shape import ModelShape


def missing_part(shape: ModelShape) -> str | None:
    """What of the model this engine does not compute; None: it computes all. Torch-free, for checks before a run."""
    if shape.latent is not None:
        return f"the latent attention of {shape.architecture}"
    if shape.experts is not None and shape.experts.shared_ffn_hidden_size:
        return f"the shared expert of {shape.architecture}"
    return None
