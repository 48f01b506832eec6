"""Affine quantisation of weights in groups along their rows, bit for bit as MLX and mlx-lm store it.

A weight of shape (..., n) becomes `weight` (..., n * bits / 32) uint32, `scales` and `biases` (..., n / group_size):
value = scale * integer + bias. NumPy only, so that a file does not depend on the machine that wrote it and the oracle
and the PyTorch twin can read it; a test compares the bits with `mlx.core.quantize`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from bmojo_edge.config import Quantization

Array = np.ndarray

_CHUNK = 1 << 22  # values worked on at once, so that a large embedding needs no large temporaries
# Small, and errors in them act on the state, on its gates or on the routing.
_NEVER = ("conv", "norm", "router", "dt_proj", "a_proj", "b_proj", "gk_proj")


def is_quantizable(name: str, shape: tuple[int, ...], quantization: Quantization) -> bool:
    """Whether a parameter is stored quantised: linear and embedding weights whose rows are whole groups."""
    *_, owner, leaf = ("", *name.split("."))
    if leaf != "weight" or len(shape) < 2 or any(word in owner for word in _NEVER):
        return False
    return shape[-1] % quantization.group_size == 0


def packed_shapes(shape: tuple[int, ...], quantization: Quantization) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the packed weight and of its scales and biases."""
    *rows, n = shape
    return (*rows, n * quantization.bits // 32), (*rows, n // quantization.group_size)


def quantize(weight: Array, quantization: Quantization) -> tuple[Array, Array, Array]:
    """Packed weight, scales and biases of a weight (..., n); scales and biases keep its dtype."""
    rows = weight.reshape(-1, weight.shape[-1])
    step = max(1, _CHUNK // rows.shape[1])
    parts = [_quantize(rows[i : i + step], quantization) for i in range(0, len(rows), step)]
    packed, scales, biases = (np.concatenate(part) for part in zip(*parts, strict=True))
    shape, groups = packed_shapes(weight.shape, quantization)
    return packed.reshape(shape), scales.reshape(groups), biases.reshape(groups)


def _quantize(w: Array, quantization: Quantization) -> tuple[Array, Array, Array]:
    """MLX's rule: the end of the range farther from zero is met exactly, and so is zero where the range spans it."""
    levels = np.float32(2**quantization.bits - 1)
    x = w.astype(np.float32).reshape(len(w), -1, quantization.group_size)  # (rows, groups, group_size)
    high, low = x.max(-1), x.min(-1)
    down = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / levels, np.float32(1e-7))
    scale, edge = np.where(down, scale, -scale), np.where(down, low, high)
    at_edge = np.rint(edge / scale)
    scale = np.where(at_edge == 0, scale, edge / np.where(at_edge == 0, np.float32(1), at_edge))
    bias = np.where(at_edge == 0, np.float32(0), edge)
    q = np.clip(np.rint((x - bias[..., None]) / scale[..., None]), 0, levels).astype(np.uint8)
    return _pack(q.reshape(w.shape), quantization.bits), scale.astype(w.dtype), bias.astype(w.dtype)


def _pack(q: Array, bits: int) -> Array:
    """Integers (rows, n) as one little-endian stream of bits in uint32 words (rows, n * bits / 32)."""
    if bits == 8:
        return np.ascontiguousarray(q).view("<u4").astype(np.uint32, copy=False)
    if bits == 4:
        return np.ascontiguousarray(q[:, ::2] | q[:, 1::2] << 4).view("<u4").astype(np.uint32, copy=False)
    stream = np.unpackbits(q[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(len(q), -1), axis=-1, bitorder="little").view("<u4").astype(np.uint32, copy=False)


def _unpack(packed: Array, bits: int) -> Array:
    """The integers (rows, n) in packed words."""
    octets = np.ascontiguousarray(packed.astype("<u4", copy=False)).view(np.uint8)
    if bits == 8:
        return octets
    if bits == 4:
        return np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(packed), -1)
    stream = np.unpackbits(octets, axis=-1, bitorder="little").reshape(len(packed), -1, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]


def dequantize(packed: Array, scales: Array, biases: Array, quantization: Quantization) -> Array:
    """The weight (..., n) in float32."""
    words, groups = packed.reshape(-1, packed.shape[-1]), scales.shape[-1]
    q = _unpack(words, quantization.bits)
    out = q.reshape(len(q), groups, -1).astype(np.float32)
    out *= scales.reshape(len(q), groups, 1).astype(np.float32)
    out += biases.reshape(len(q), groups, 1).astype(np.float32)
    return out.reshape(*packed.shape[:-1], -1)


class Dequantized(Mapping[str, np.ndarray]):
    """A view of stored tensors with every quantised weight as float32, computed when it is asked for."""

    def __init__(self, tensors: Mapping[str, Array], quantization: Quantization) -> None:
        self._tensors, self._quantization = tensors, quantization
        self._packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}

    def _is_companion(self, name: str) -> bool:
        owner, _, leaf = name.rpartition(".")
        return leaf in ("scales", "biases") and owner in self._packed

    def __getitem__(self, name: str) -> Array:
        if self._is_companion(name):
            raise KeyError(name)
        owner, _, leaf = name.rpartition(".")
        if leaf != "weight" or owner not in self._packed:
            return self._tensors[name]
        scales, biases = self._tensors[f"{owner}.scales"], self._tensors[f"{owner}.biases"]
        return dequantize(self._tensors[name], scales, biases, self._quantization)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if not self._is_companion(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def dequantized(tensors: Mapping[str, Array], quantization: Quantization | None) -> Mapping[str, Array]:
    """The stored tensors as plain parameters: themselves where nothing is quantised."""
    return tensors if quantization is None else Dequantized(tensors, quantization)
