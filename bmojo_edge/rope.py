"""Rotary frequencies as fractions of a turn in 64-bit integers, so that positions can run for ever.

A float32 angle is off by 0.06 rad at position 1,000,000. `position * turns mod 2^64` wraps exactly, on any device, and
only the fraction of a turn that is left goes to float for sine and cosine (docs/model.md section 3, step 4).
NumPy only; each engine multiplies and rotates with arrays of its own.
"""

from __future__ import annotations

import math

import numpy as np

from bmojo_edge.config import Config, RopeScaling


def _frequencies(theta: float, head_dim: int) -> np.ndarray:
    """Radians a token, (p / 2,): theta^(-2j / p)."""
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _llama3(freq: np.ndarray, s: RopeScaling) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    assert s.original_max_position_embeddings
    assert s.low_freq_factor
    assert s.high_freq_factor
    turns_in_context = s.original_max_position_embeddings * freq / (2 * np.pi)
    smooth = (turns_in_context - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * freq / s.factor + smooth * freq


def _yarn(freq: np.ndarray, s: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """YaRN (arXiv 2309.00071, section 3.2): interpolate where fewer than beta_slow turns fit in the context."""
    assert s.original_max_position_embeddings

    def dimension(turns: float) -> float:
        context = s.original_max_position_embeddings or 0
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return freq / s.factor * ramp + freq * (1 - ramp)


def _yarn_attention_factor(s: RopeScaling) -> float:
    if s.attention_factor is not None:
        return s.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if s.factor <= 1 else 0.1 * mscale * math.log(s.factor) + 1.0

    if s.mscale and s.mscale_all_dim:
        return magnitude(s.mscale) / magnitude(s.mscale_all_dim)
    return magnitude(1.0)


def turns_per_token(config: Config) -> np.ndarray | None:
    """Turns a token of each pair of dimensions, in 2^-64 of a turn, (p / 2,) uint64; None without positions."""
    if config.rope_theta is None:
        return None
    freq = _frequencies(config.rope_theta, config.d_head)
    scaling = config.rope_scaling
    if scaling is not None:
        if scaling.rope_type == "linear":
            freq = freq / scaling.factor
        elif scaling.rope_type == "llama3":
            freq = _llama3(freq, scaling)
        elif scaling.rope_type == "yarn":
            freq = _yarn(freq, scaling, config.rope_theta, config.d_head)
    return np.round(freq / (2 * np.pi) * 2.0**64).astype(np.uint64)


def softmax_scale(config: Config) -> float:
    """Scale of attention scores: 1 / sqrt(p), times the square of YaRN's attention factor (it scales q and k alike)."""
    scale = config.d_head**-0.5
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "yarn":
        scale *= _yarn_attention_factor(config.rope_scaling) ** 2
    return scale
