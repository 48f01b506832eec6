"""Rotary embeddings as other programs write them: theta and scaling from config.json or from GGUF's keys.

Whatever is not default, linear, llama3 or yarn is refused by name: a wrong frequency gives a silently wrong model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bmojo_convert.names import ConvertError
from bmojo_edge.config import ROPE_TYPES, ConfigError, RopeScaling

_THETA = 10_000.0  # where nothing is said, in transformers and llama.cpp alike
_SCALING_KEYS = {
    "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "attention_factor", "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip
_OTHER_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
_LLAMA3_CONTEXT = 8192  # GGUF does not keep it; only its ratio to the two thresholds matters

Rope = tuple[float, RopeScaling | None]


def from_huggingface(content: Mapping[str, Any], where: str) -> Rope:
    """Theta and scaling from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (earlier)."""
    key = "rope_scaling" if content.get("rope_scaling") else "rope_parameters"  # transformers prefers the old one
    given = content.get(key) or {}
    if not isinstance(given, Mapping):
        raise ConvertError(f"{where}: {key} must be a table, got {given!r}")
    nested = [name for name, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise ConvertError(f"{where}: {key}.{nested[0]}: rotary parameters per layer type are not supported")
    partial = given.get("partial_rotary_factor", content.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConvertError(f"{where}: partial_rotary_factor {partial}: partial rotary embeddings are not supported")
    theta = float(given.get("rope_theta") or content.get("rope_theta") or _THETA)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConvertError(f"{where}: {key}.rope_type {kind!r} is not supported; known are {', '.join(ROPE_TYPES)}")
    unknown = sorted(given.keys() - _SCALING_KEYS - _OTHER_KEYS)
    if unknown:
        raise ConvertError(f"{where}: {key}.{unknown[0]} is not supported with rope_type {kind!r}")
    if kind == "default":
        return theta, None
    fields = {name: given[name] for name in _SCALING_KEYS & given.keys() if given[name] is not None}
    length = content["max_position_embeddings"]
    if kind in ("llama3", "yarn"):
        context = content.get("original_max_position_embeddings", given.get("original_max_position_embeddings"))
        fields["original_max_position_embeddings"] = int(context or length)
        if kind == "yarn" and "factor" not in fields:
            fields["factor"] = length / fields["original_max_position_embeddings"]
    if "factor" not in fields:
        raise ConvertError(f"{where}: {key}.factor is missing, rope_type {kind!r} needs it")
    # transformers takes 0 for "not given" here.
    fields = {k: v for k, v in fields.items() if v or k not in ("beta_fast", "beta_slow")}
    try:
        return theta, RopeScaling(rope_type=kind, **fields)
    except ConfigError as error:
        raise ConvertError(f"{where}: {key}: {error}") from None


def from_gguf(keys: Mapping[str, Any], factors: np.ndarray | None, head_dim: int, where: str) -> Rope:
    """Theta and scaling from the `rope.*` keys of an architecture; factors (p / 2,) is `rope_freqs.weight` or None."""
    theta = as_decimal(keys.get("rope.freq_base", _THETA))
    kind = keys.get("rope.scaling.type", "none")
    factor = as_decimal(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0)))
    if kind == "none" and "rope.scale_linear" in keys and factor != 1:
        kind = "linear"
    if kind not in ("none", "linear", "yarn"):
        raise ConvertError(f"{where}: rope.scaling.type {kind!r} is not supported; known are none, linear, yarn")
    if factors is not None:
        if kind != "none":
            raise ConvertError(f"{where}: rope_freqs.weight together with rope.scaling.type {kind!r} is not supported")
        return theta, _llama3(theta, factors.astype(np.float64), head_dim, keys, where)
    if kind == "none" or (kind == "linear" and factor == 1):
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(rope_type="linear", factor=factor)
    context = keys.get("rope.scaling.original_context_length", keys.get("context_length"))
    if not context:
        raise ConvertError(f"{where}: rope.scaling.original_context_length is missing, yarn needs it")
    optional: dict[str, Any] = {
        "beta_fast": keys.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": keys.get("rope.scaling.yarn_beta_slow"),
    }
    attention = keys.get("rope.scaling.yarn_attn_factor", keys.get("rope.scaling.attn_factor"))
    if attention is not None:  # a further factor on top of YaRN's own; transformers' replaces it
        optional["attention_factor"] = as_decimal(attention) * (0.1 * np.log(factor) + 1.0 if factor > 1 else 1.0)
    if keys.get("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise ConvertError(f"{where}: rope.scaling.yarn_ext_factor is not supported")
    fields: dict[str, Any] = {name: as_decimal(value) for name, value in optional.items() if value is not None}
    return theta, RopeScaling(rope_type="yarn", factor=factor, original_max_position_embeddings=int(context), **fields)


def as_decimal(value: Any) -> float:
    """A float32 of a file as the decimal that was meant: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _llama3(
    theta: float, factors: np.ndarray, head_dim: int, keys: Mapping[str, Any], where: str
) -> RopeScaling | None:
    """Llama 3.1's parameters from the factors they gave: 1 at high frequencies, `factor` at low ones, a line between.

    The share s of the unscaled frequency is clip((turns - low) / (high - low)), turns = context * freq / 2 pi, so two
    points of it determine low and high for a context; the result must reproduce every factor.
    """
    if factors.shape != (head_dim // 2,):
        raise ConvertError(f"{where}: tensor 'rope_freqs.weight' has shape {factors.shape}, not {(head_dim // 2,)}")
    if np.all(factors == 1):
        return None
    factor = as_decimal(keys.get("rope.scaling.factor", factors.max()))
    freq = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    context = int(keys.get("rope.scaling.original_context_length", _LLAMA3_CONTEXT))
    turns = context * freq / (2 * np.pi)
    share = (1 / factors - 1 / factor) / (1 - 1 / factor) if factor != 1 else np.ones_like(factors)
    inside = np.flatnonzero((share > 1e-6) & (share < 1 - 1e-6))
    kept, scaled = np.flatnonzero(share >= 1 - 1e-6), np.flatnonzero(share <= 1e-6)
    if len(inside) >= 2:
        a, b = inside[0], inside[-1]
        points = [(turns[a], share[a]), (turns[b], share[b])]
    elif len(kept) and len(scaled):  # any line that separates them gives the same factors
        a, b = kept[-1], scaled[0]
        points = [(turns[a], 1.0), (turns[b], 0.0)]
        if len(inside):
            m = inside[0]
            steep = max((1 - share[m]) / (turns[a] - turns[m]), share[m] / (turns[m] - turns[b]))
            points = [(turns[m] + 1.0, share[m] + steep), (turns[m], share[m])]
    else:
        raise ConvertError(f"{where}: tensor 'rope_freqs.weight' is not a llama3 scaling")
    (x1, y1), (x2, y2) = points
    slope = (y1 - y2) / (x1 - x2)
    low, high = x1 - y1 / slope, x1 + (1 - y1) / slope
    for digits in (3, 17):  # a round number where one was meant
        low_factor, high_factor = float(f"{low:.{digits}g}"), float(f"{high:.{digits}g}")
        again = np.clip((turns - low_factor) / (high_factor - low_factor), 0, 1)
        if np.allclose(1 / (again + (1 - again) / factor), factors, rtol=2e-6):
            return RopeScaling(
                rope_type="llama3",
                factor=factor,
                original_max_position_embeddings=context,
                low_freq_factor=low_factor,
                high_freq_factor=high_factor,
            )
    raise ConvertError(f"{where}: tensor 'rope_freqs.weight' is not a llama3 scaling")
