"""Hugging Face <-> Megatron: mapping tables, loading by slices, streaming export, Hugging Face folders."""
