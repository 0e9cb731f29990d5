"""The model's head: log-probs and the GRPO loss, from logits or hidden states, and the backends that compute them."""
