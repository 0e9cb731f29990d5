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

BLOCK_SIZE = 16  # tokens of a block of the KV cache; a sequence wastes half a block on average


def num_blocks(num_tokens: int) -> int:
    """Blocks that so many tokens take."""
    return -(-num_tokens // BLOCK_SIZE)


def bytes_per_block(shape: ModelShape, itemsize: int) -> int:
    """Bytes of the keys and values of all layers in a block.

    Args:
        itemsize: bytes of a number.
    """
    return 2 * shape.num_layers * shape.num_kv_heads * BLOCK_SIZE * shape.head_dim * itemsize


def least_blocks(max_model_len: int) -> int:
    """Blocks of a sequence of the greatest length: prompt and response begin blocks of their own."""
    return num_blocks(max_model_len) + 1


def missing_part(shape: ModelShape) -> str | None:
    """What this engine does not compute of the model; None if it computes all. Torch-free, for checks before a run."""
    if shape.latent is not None:
        return f"the latent attention of {shape.architecture}"
    if shape.experts is not None and shape.experts.shared_ffn_hidden_size:
        return f"the shared expert of {shape.architecture}"
    return None
