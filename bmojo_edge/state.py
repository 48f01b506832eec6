"""The decoding state: a value made of NamedTuples whose shapes follow from the config alone (docs/model.md section 6).

The oracle and both twins use these classes with arrays of their own, so states compare leaf by leaf. A memory a layer
does not have is the empty tuple: it has no leaves. This module knows shapes and dtypes, not how the arrays are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from bmojo_edge.config import ITEMSIZE, SSM, Config
from bmojo_edge.ssm_config import conv_channels, delta_sizes

# A growing cache is allocated in steps of this many tokens, as mlx-lm does.
GROWTH = 256

# Where a recalled token stands that is not of this sequence.
ELSEWHERE = -2

# What one attention reads, in the order in which it is told of.
MEMORIES = ("window", "fading", "eidetic", "sinks", "storage")


class Leaf(NamedTuple):
    """Shape and dtype of one array of a state; `fill` is what a fresh state holds."""

    shape: tuple[int, ...]
    dtype: str
    fill: int = 0


class WindowState(NamedTuple):
    """In-context ring: slot = position mod window. Keys are rotated; scores feed the eidetic choice."""

    k: Any  # (b, g, w, p)
    v: Any  # (b, g, w, p)
    scores: Any  # (b, w) float32, () without eidetic memory


class FadingState(NamedTuple):
    """Fading ring: slot = position mod (window + n_fading), keys rotated."""

    k: Any  # (b, g, w + f, p)
    v: Any  # (b, g, w + f, p)


class SinkState(NamedTuple):
    """The first n_sinks tokens, kept for ever in slots of their own, keys unrotated."""

    k: Any  # (b, g, s, p)
    v: Any  # (b, g, s, p)


class EideticState(NamedTuple):
    """The e most surprising tokens so far, sorted by position, empty slots (position -1) last, keys unrotated."""

    k: Any  # (b, g, e, p)
    v: Any  # (b, g, e, p)
    scores: Any  # (b, e) float32, 0 where empty
    positions: Any  # (b, e) int64


class RecalledState(NamedTuple):
    """Blocks of tokens read back from storage (docs/storage.md), keys unrotated."""

    k: Any  # (b, g, n, p)
    v: Any  # (b, g, n, p)
    positions: Any  # (b, n) int64: the token's own where it is of this sequence, ELSEWHERE where not, -1 = empty


class MambaState(NamedTuple):
    """Mamba-1: the last d_conv - 1 inputs of the convolution, oldest first, and the scan's state."""

    conv: Any  # (b, d_conv - 1, d_inner)
    ssm: Any  # (b, d_inner, d_state) float32


class Mamba2State(NamedTuple):
    """Mamba-2: the last d_conv - 1 inputs of the convolution (x, B, C), oldest first, and the state of every head."""

    conv: Any  # (b, d_conv - 1, channels of x, B and C)
    ssm: Any  # (b, heads, head_dim, d_state) float32


class GDNState(NamedTuple):
    """Gated DeltaNet: the last d_conv - 1 of q, k and v before their convolutions, and the map from keys to values."""

    conv: Any  # (b, d_conv - 1, channels of q, k and v), () without convolutions
    ssm: Any  # (b, heads, p of v, p of k) float32


class GKAState(NamedTuple):
    """Gated KalmaNet: the last d_conv - 1 of q, k (and v), the keys' Gram matrix H and the values' map U."""

    conv: Any  # (b, d_conv - 1, channels of q, k and, where it is convolved, v)
    H: Any  # (b, heads, p, p) float32: sum of decayed k k^T
    U: Any  # (b, heads, p of v, p of k) float32: sum of decayed v k^T


class BMojoState(NamedTuple):
    """All memories of one bmojo layer."""

    window: WindowState
    fading: Any  # FadingState | ()
    sinks: Any  # SinkState | ()
    eidetic: Any  # EideticState | ()
    history: Any  # (b, taps, d_model) float32: the last values of the innovation's signal, oldest first | ()
    ssm: Any  # MambaState | Mamba2State | GDNState | GKAState | ()
    # With storage only (recall.py); a state without these stays as it was.
    recalled: Any = ()  # RecalledState | ()
    queries: Any = ()  # (b, n, h p) float32: the last n queries, unrotated, oldest first | ()


class AttentionState(NamedTuple):
    """Rotated keys and values of an attention layer: a ring of attention_window slots, or a cache that grows."""

    k: Any  # (b, g, n, p)
    v: Any  # (b, g, n, p)


class State(NamedTuple):
    """Everything a sequence remembers. `position` counts its tokens from 0; rotation sees position + offset."""

    layers: tuple[Any, ...]
    position: Any  # (b,) int64
    offset: Any  # (b,) int64


def attending(config: Config) -> list[bool]:
    """Which layers have attention."""
    return [kind in ("bmojo", "attention") for kind in config.layer_types]


def capacity(tokens: int) -> int:
    """Slots of a growing cache that holds `tokens` tokens."""
    return math.ceil(tokens / GROWTH) * GROWTH


def _ssm_spec(ssm: SSM, config: Config, batch: int) -> Any:
    channels = conv_channels(ssm, config.d_model)
    conv = Leaf((batch, ssm.d_conv - 1, channels), config.dtype) if channels else ()
    if ssm.kind == "mamba":
        return MambaState(conv, Leaf((batch, channels, ssm.d_state), "float32"))
    if ssm.kind == "mamba2":
        return Mamba2State(conv, Leaf((batch, ssm.n_heads, ssm.head_dim, ssm.d_state), "float32"))
    square = Leaf((batch, delta_sizes(ssm).heads, ssm.head_dim, ssm.head_dim), "float32")
    return GDNState(conv, square) if ssm.kind == "gdn" else GKAState(conv, square, square)


def layer_spec(config: Config, layer: int, batch: int = 1, tokens: int = 0) -> Any:
    """Shape and dtype of every array of one layer's state."""
    kind, ssm = config.layer_types[layer], config.ssm_of(layer)

    def slots(n: int) -> Leaf:
        return Leaf((batch, config.kv_heads, n, config.d_head), config.dtype)

    if kind == "attention":
        n = config.attention_window_of(layer) or capacity(tokens)
        return AttentionState(slots(n), slots(n))
    if kind != "bmojo":
        assert ssm is not None
        return _ssm_spec(ssm, config, batch)
    w, f, e, s = config.window, config.fading_of(layer), config.n_eidetic, config.n_sinks
    history = Leaf((batch, config.innovation.taps, config.d_model), "float32")
    return BMojoState(
        window=WindowState(slots(w), slots(w), Leaf((batch, w), "float32") if e else ()),
        fading=FadingState(slots(w + f), slots(w + f)) if f else (),
        sinks=SinkState(slots(s), slots(s)) if s else (),
        eidetic=EideticState(slots(e), slots(e), Leaf((batch, e), "float32"), Leaf((batch, e), "int64", -1))
        if e
        else (),
        history=history if e else (),
        ssm=_ssm_spec(ssm, config, batch) if ssm else (),
    )


def state_spec(config: Config, batch: int = 1, tokens: int = 0) -> State:
    """Shape and dtype of every array of a state after `tokens` tokens (they matter only to growing caches)."""
    layers = tuple(layer_spec(config, i, batch, tokens) for i in range(len(config.layer_types)))
    return State(layers, Leaf((batch,), "int64"), Leaf((batch,), "int64"))


def map_leaves(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`function` applied to every leaf of a state (and the same leaf of `others`), in a state of the same form."""
    if isinstance(tree, Leaf) or not isinstance(tree, tuple):
        return function(tree, *others)
    parts = [map_leaves(function, *children) for children in zip(tree, *others, strict=True)]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every array of a state with its dotted name, such as `layers.0.window.k`."""
    if isinstance(tree, Leaf) or not isinstance(tree, tuple):
        yield name, tree
        return
    names = getattr(tree, "_fields", None) or [str(i) for i in range(len(tree))]
    for child_name, child in zip(names, tree, strict=True):
        yield from leaves(child, f"{name}.{child_name}" if name else child_name)


def spec_bytes(spec: State) -> int:
    """Bytes of a state with this specification."""
    return sum(math.prod(leaf.shape) * ITEMSIZE[leaf.dtype] for _, leaf in leaves(spec))
