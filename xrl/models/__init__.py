"""Hugging Face decoders as megatron-core models: their shape, layers and output head."""

# Architectures (as config.json names them) that xrl trains. Torch-free, so that flags can be checked at once.
ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
