"""The models of the comparison, as configurations, and what each of them may remember, in bytes.

All are two layers without MLP, as in Zoology. Transformers are rotary; models with an SSM may be, or have no positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bmojo_edge import Config
from bmojo_edge.config import SSM, Innovation
from bmojo_edge.state import leaves, spec_bytes, state_spec

LAYERS = 2
HEAD_DIM = 32
ROPE_THETA = 10_000.0
MAX_STATES = 64  # of a channel: the scan of 256 takes minutes to compile for a GPU


def _attention(base: dict[str, Any], window: int | None) -> Config:
    return Config(layer_types=("attention",) * LAYERS, attention_window=window, rope_theta=ROPE_THETA, **base)


def _ssm(d_state: int, expand: int) -> SSM:
    return SSM(kind="mamba", d_state=d_state, expand=expand)


def transformer(base: dict[str, Any], **_: Any) -> Config:
    """Full attention: its memory is the sequence."""
    return _attention(base, None)


def sliding_window(base: dict[str, Any], window: int, **_: Any) -> Config:
    """Attention over the last `window` tokens."""
    return _attention(base, window)


def mamba(base: dict[str, Any], d_state: int, expand: int, **_: Any) -> Config:
    """The SSM alone."""
    return Config(layer_types=("mamba",) * LAYERS, ssm=_ssm(d_state, expand), **base)


def hybrid(base: dict[str, Any], window: int, d_state: int, expand: int, rotary: bool, **_: Any) -> Config:
    """Mamba, then attention over a window: a Jamba in small."""
    return Config(
        layer_types=("mamba", "attention"),
        attention_window=window,
        ssm=_ssm(d_state, expand),
        rope_theta=ROPE_THETA if rotary else None,
        **base,
    )


def bmojo(
    base: dict[str, Any],
    window: int,
    d_state: int,
    expand: int,
    rotary: bool,
    n_eidetic: int,
    n_fading: int | None = None,
    chunk: int | None = None,
    innovation: dict[str, Any] | None = None,
) -> Config:
    """B'MOJO; without eidetic slots it is B'MOJO-F."""
    return Config(
        layer_types=("bmojo",) * LAYERS,
        ssm=_ssm(d_state, expand),
        rope_theta=ROPE_THETA if rotary else None,
        window=window,
        n_eidetic=n_eidetic,
        n_fading=n_fading,
        chunk=chunk or window,
        innovation=Innovation(**innovation or {}),
        **base,
    )


MODELS: dict[str, Callable[..., Config]] = {
    "transformer": transformer,
    "window": sliding_window,
    "mamba": mamba,
    "hybrid": hybrid,
    "bmojo-f": bmojo,
    "bmojo": bmojo,
}


def config_of(
    model: str,
    vocab_size: int,
    d_model: int,
    window: int,
    n_eidetic: int,
    d_state: int = 16,
    expand: int = 2,
    rotary: bool = False,
    **options: Any,
) -> Config:
    """The configuration of a cell. `options` are B'MOJO's own: n_fading, chunk, innovation."""
    heads = d_model // HEAD_DIM
    base = {"vocab_size": vocab_size, "d_model": d_model, "n_heads": heads, "tie_embeddings": False}
    eidetic = n_eidetic if model == "bmojo" else 0
    sizes = {"window": window, "d_state": d_state, "expand": expand, "n_eidetic": eidetic}
    return MODELS[model](base, **sizes, rotary=rotary, **options)


def memory_bytes(config: Config, tokens: int) -> dict[str, int]:
    """Bytes of the state of one sequence after `tokens` tokens: `ssm`, `eidetic`, `rings` (keys and values), `total`.

    The few bytes left out of the three are sinks and the innovation's short history; positions are not counted.
    """
    spec = state_spec(config, 1, tokens)
    found = dict.fromkeys(("ssm", "eidetic", "rings"), 0)
    for name, leaf in leaves(spec.layers):
        size = spec_bytes(spec._replace(layers=(leaf,), position=(), offset=()))
        parts = name.split(".")
        kind = parts[1]
        if kind in ("ssm", "conv"):
            found["ssm"] += size
        elif kind == "eidetic":
            found["eidetic"] += size
        elif kind in ("window", "fading", "k", "v"):
            found["rings"] += size
    total = spec_bytes(spec._replace(position=(), offset=()))
    return {**found, "total": total}


def matching_state(model: str, budget: int, tokens: int, **sizes: Any) -> dict[str, int]:
    """The least doubling of the SSM's state that remembers `budget` bytes or more: equal memory, in the SSM's favour.

    `d_state` grows to MAX_STATES, then `expand`, which adds parameters too.
    """
    d_state, expand = 16, 2
    while memory_bytes(config_of(model, d_state=d_state, expand=expand, **sizes), tokens)["total"] < budget:
        d_state, expand = (2 * d_state, expand) if d_state < MAX_STATES else (d_state, 2 * expand)
    return {"d_state": d_state, "expand": expand}
