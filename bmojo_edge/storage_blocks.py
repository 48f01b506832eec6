"""What a store keeps of a block of tokens, as bytes: keys and values in 8 bits, and the summary it is found by.

NumPy's form is here; both twins compute the same bytes on their own device (`Model.window_blocks`). It knows nothing of
files (docs/storage.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Shape(NamedTuple):
    """The sizes of everything a store holds of one block of tokens."""

    block: int  # tokens of a block
    layers: tuple[int, ...]  # layers whose keys and values are kept
    router: int  # the layer by whose queries and keys blocks are chosen
    pool: int  # neighbouring keys of the router whose mean is one summary vector
    kv_heads: int
    head_dim: int

    @property
    def summaries(self) -> int:
        """Summary vectors of a block and head."""
        return self.block // self.pool

    @property
    def scales_bytes(self) -> int:
        """Bytes of the float16 scales of a block, one for each layer, keys or values, head and token."""
        return 2 * len(self.layers) * 2 * self.kv_heads * self.block

    @property
    def payload_bytes(self) -> int:
        """Bytes of a block's keys and values."""
        return self.scales_bytes + len(self.layers) * 2 * self.kv_heads * self.block * self.head_dim

    @property
    def summary_bytes(self) -> int:
        """Bytes of a block's summary."""
        return 2 * self.summaries * self.kv_heads * self.head_dim

    @property
    def entry(self) -> np.dtype[Any]:
        """A block's line in the table."""
        return np.dtype(
            [
                ("id", "<u8"), ("branch", "<i8"), ("start", "<i8"), ("tokens", "<i4"), ("ids", "<i4", (self.block,)),
                ("payload", "<u4"), ("summary", "<u4"), ("crc", "<u4"),
            ]
        )  # fmt: skip


class Blocks(NamedTuple):
    """The parts of `packed` bytes."""

    payloads: np.ndarray  # (n, payload_bytes) uint8
    summaries: np.ndarray  # (n, summaries, g, p) float16


def packed(kv: np.ndarray, shape: Shape, skip: int = 0) -> np.ndarray:
    """Blocks of b rows as one array of bytes: payloads (b, n, payload_bytes), then summaries (b, n, summary_bytes).

    kv (layers, 2, b, g, t, p): unrotated keys, and values, of the shape's layers and, last, of its router where that is
    not among them. A payload is float16 scales (layers, 2, g, block), then int8 values (layers, 2, g, block, p):
    symmetric, one scale for every token and head. A summary is the means of `pool` neighbouring keys of the router.
    The first `skip` tokens are kept as copies of the one after them; the last token fills up the last block.
    """
    s, t = shape, kv.shape[4]
    n, b, skip = -(-t // s.block), kv.shape[2], min(skip, t - 1)
    tokens = np.clip(np.arange(n * s.block), skip, t - 1)
    kv = kv[..., tokens, :].astype(np.float32)
    router = s.layers.index(s.router) if s.router in s.layers else len(s.layers)
    pairs = kv[router, 0].reshape(b, s.kv_heads, n, s.summaries, s.pool, s.head_dim)
    means = sum(pairs[..., i, :] for i in range(s.pool)) * np.float32(1 / s.pool)
    summaries = np.asarray(means).transpose(0, 2, 3, 1, 4).astype(np.float16)  # (b, n, m, g, p)
    values = kv[: len(s.layers)].reshape(len(s.layers), 2, b, s.kv_heads, n, s.block, s.head_dim)
    values = np.ascontiguousarray(values.transpose(2, 4, 0, 1, 3, 5, 6))
    scales = (np.abs(values).max(-1) / np.float32(127)).astype(np.float16)
    inverse = np.divide(np.float32(1), scales.astype(np.float32), out=np.zeros(scales.shape, "f4"), where=scales > 0)
    values = np.clip(np.rint(values * inverse[..., None]), -127, 127).astype(np.int8)
    payloads = [part.reshape(b * n, -1).view(np.uint8) for part in (scales, values)]
    return np.concatenate([np.concatenate(payloads, axis=1).reshape(-1), summaries.reshape(-1).view(np.uint8)])


def blocks_of(data: np.ndarray, shape: Shape) -> Blocks:
    """The parts of `packed` bytes, not copied."""
    n = len(data) // (shape.payload_bytes + shape.summary_bytes)
    payloads, summaries = np.split(data, [n * shape.payload_bytes])
    size = (n, shape.summaries, shape.kv_heads, shape.head_dim)
    return Blocks(payloads.reshape(n, -1), summaries.view(np.float16).reshape(size))


def unpacked(payloads: np.ndarray, shape: Shape) -> np.ndarray:
    """Keys and values (layers, 2, b, g, n * block, p) float16 of payloads (b, n, payload_bytes)."""
    b, n = payloads.shape[:2]
    size = (b, n, len(shape.layers), 2, shape.kv_heads, shape.block)
    scales, values = np.split(payloads, [shape.scales_bytes], axis=2)
    scales = np.ascontiguousarray(scales).view(np.float16).reshape(size).astype(np.float32)
    values = values.view(np.int8).reshape(*size, shape.head_dim).astype(np.float32)
    found = (values * scales[..., None]).astype(np.float16).transpose(2, 3, 0, 4, 1, 5, 6)
    return found.reshape(len(shape.layers), 2, b, shape.kv_heads, n * shape.block, shape.head_dim)
