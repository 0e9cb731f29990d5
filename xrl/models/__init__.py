"""Hugging Face decoders as megatron-core models: their shape, layers and output head."""

from xrl.models.families import FAMILIES

# Architectures (as config.json names them) that xrl trains. Torch-free, so that flags can be checked at once.
ARCHITECTURES = tuple(FAMILIES)
