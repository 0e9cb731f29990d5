"""The embedded engine: a batched decoder for Qwen2, Qwen2.5 and Qwen3 on CPU and CUDA, in this process.

engine.py     the engine contract: requests in, futures out, a thread that steps
scheduler.py  who runs: requests waiting, samples running, blocks handed out and returned
batch.py      the arrays of one decode step
model.py      the forward pass: prefill and decode
weights.py    Hugging Face tensors -> packed weights, a layer at a time
cache.py      the paged KV cache
sampler.py    tokens and log-probs from logits
"""
