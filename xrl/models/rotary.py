"""Rotary frequencies (arXiv:2104.09864), as transformers computes them for each family."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xrl.models.shape import ModelShape, RopeScaling


def rotary_frequencies(shape: ModelShape) -> Tensor:
    """[d / 2] fp32, in radians a position, for the d dimensions of a head that are rotated: all, or latent's part."""
    dim = shape.head_dim if shape.latent is None else shape.latent.qk_rope_head_dim
    frequencies = 1.0 / shape.rope_base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return frequencies if shape.rope_scaling is None else _stretched(frequencies, shape.rope_scaling)


def rotary_table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [L, d / 2] of each position's angles, computed in fp32 as Hugging Face does."""
    angles = torch.outer(positions.float(), frequencies)
    return angles.cos(), angles.sin()


def _stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3's: long wavelengths grow by `factor`, short ones stay, those between go over smoothly.

    s = (L / wavelength - low) / (high - low), clipped to [0, 1]:  f' = (1 - s) f / factor + s f
    """
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((scaling.original_max_positions / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequencies / scaling.factor + share * frequencies
