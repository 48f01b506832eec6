"""Operations of a model: norms, rotation, convolution, scan, innovation, selection, attention.

Everything here is a function of arrays. Nothing here knows a config, a parameter or a state. Those that have a Metal
kernel come from `bmojo_metal`, which runs it on an Apple GPU and plain MLX elsewhere.

b batch, t tokens of the call, d channels, n state or columns, h query heads, g key/value heads, p head_dim, c chunks.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

import bmojo_metal
from bmojo_metal import Band as Band
from bmojo_metal import Eidetic as Eidetic
from bmojo_metal import Linear as Linear
from bmojo_metal import MambaWeights as MambaWeights
from bmojo_metal import Pinned as Pinned
from bmojo_metal import Queries as Queries
from bmojo_metal import Ring as Ring
from bmojo_metal import Rotary as Rotary
from bmojo_metal import Slots as Slots
from bmojo_metal import Unrounded as Unrounded
from bmojo_metal import add_rms_norm as add_rms_norm
from bmojo_metal import exported as exported
from bmojo_metal import innovation_scores as innovation_scores
from bmojo_metal import innovation_step as innovation_step
from bmojo_metal import linear_wide as linear_wide
from bmojo_metal import memory_attention as memory_attention
from bmojo_metal import memory_attention_step as memory_attention_step
from bmojo_metal import promote as promote
from bmojo_metal import rotate as rotate
from bmojo_metal import rotate_token as rotate_token
from bmojo_metal import scan_inputs as scan_inputs
from bmojo_metal import selective_scan as selective_scan
from bmojo_metal import selective_scan_step as selective_scan_step
from bmojo_metal import silu_conv as silu_conv
from bmojo_metal.selection import ascending

QUERY_TILE = 128  # queries whose scores exist at one time


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32, in the wider dtype of the two."""
    return mx.fast.rms_norm(x, weight, eps)


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """SiLU(gate) * up in one kernel."""
    return gate * mx.sigmoid(gate) * up


# --- rotary positions (docs/model.md section 3, step 4) ---------------------------------------------------------------


def rotary(positions: mx.array, turns: mx.array) -> Rotary:
    """Angles of positions (b, n) int64 at `turns` (p / 2,) uint64, in 2^-64 of a turn a token.

    The product wraps modulo 2^64, so positions may run for ever; only the fraction of a turn left becomes a float.
    """
    phase = (positions[..., None].astype(mx.uint64) * turns).view(mx.int64)
    angle = (phase.astype(mx.float32) * (2 * math.pi / 2.0**64))[:, None, :, None]
    sin = mx.sin(angle)
    return Rotary(mx.cos(angle), mx.concatenate([-sin, sin], axis=-2))


# --- eidetic choice (step 6) ------------------------------------------------------------------------------------------


class Candidates(NamedTuple):
    """Tokens that may be kept, in order of position where they have one."""

    scores: mx.array  # (b, n) float32, none negative
    position: mx.array  # (b, n) int64, -1 = nothing there


class Chunks(NamedTuple):
    """The chunks of a call, counted per row as they come."""

    limit: mx.array  # (b, c) int64: a chunk's set holds positions below this


def _eligible(candidates: Candidates, chunks: Chunks, first: int) -> mx.array:
    """(b, c, n): which candidates compete for which chunk."""
    position = candidates.position[:, None]
    return (position >= first) & (position < chunks.limit[..., None])


def select_eidetic(candidates: Candidates, chunks: Chunks, first: int, e: int) -> mx.array:
    """The e most surprising candidates of every chunk: (b, c, e) int32 columns, ascending, -1 = empty.

    Those at a position below `first` never compete. Ties go to the earlier column.
    """
    return bmojo_metal.select_eidetic(candidates.scores, candidates.position, chunks.limit, first, e)


def find_eidetic(candidates: Candidates, chunks: Chunks, first: int, wanted: mx.array) -> mx.array:
    """Columns of the wanted positions (b, c, e), -1 = none, in place of a choice; arguments of `select_eidetic`.

    Raises ValueError naming a position that the chunk cannot keep.
    """
    n = candidates.position.shape[1]
    equal = candidates.position[:, None, None] == wanted[..., None]  # (b, c, e, n)
    found = equal & _eligible(candidates, chunks, first)[:, :, None] & (wanted >= 0)[..., None]
    missing = np.array((wanted >= 0) & ~found.any(-1))
    if missing.any():
        raise ValueError(f"eidetic_index: position {np.array(wanted)[missing][0]} is not one this chunk can keep")
    return ascending(mx.where(found.any(-1), found.argmax(-1).astype(mx.int32), n), n, wanted.shape[-1])
