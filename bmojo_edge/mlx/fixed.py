"""The model's moves as pure functions of fixed shape, for exports: the whole state goes in and comes out.

What the host decides elsewhere is decided on the device or left to who calls: `commit` is called where a chunk begins.
"""

from __future__ import annotations

import mlx.core as mx

from bmojo_edge.mlx.chunk_layout import ChunkLayout
from bmojo_edge.mlx.decode import run_step
from bmojo_edge.mlx.layout import Step
from bmojo_edge.mlx.memory import promote
from bmojo_edge.mlx.model import Model
from bmojo_edge.state import State


def decode(model: Model, tokens: mx.array, state: State) -> tuple[mx.array, State]:
    """Logits (b, v) after one token (b, 1) of each row, and the state; nothing is promoted."""
    step = Step(model.config, state.position, state.offset)
    logits, layers = run_step(model, tokens[:, 0], state.layers, step)
    return logits, State(layers, state.position + 1, state.offset)


def prefill(model: Model, tokens: mx.array, state: State) -> tuple[mx.array, State]:
    """Logits (b, v) after a whole chunk (b, chunk) from a multiple of `chunk` on, and the state; it promotes itself."""
    layout, h, layers = ChunkLayout(model.config, state.position, state.offset), model.embed(tokens), []
    for layer, old in zip(model.layers, state.layers, strict=True):
        h, new, _ = layer(h, old, layout)
        layers.append(new)
    logits = model.head(model.norm(h[:, -1]))
    return logits, State(tuple(layers), state.position + layout.t, state.offset)


def commit(model: Model, state: State) -> State:
    """The state after rows at a multiple of `chunk` have chosen their eidetic slots anew; others stay as they are."""
    config, layers = model.config, list(state.layers)
    due = state.position % config.chunk_size == 0
    for i in committing(model):
        layers[i] = layers[i]._replace(eidetic=promote(config, layers[i], state.position, state.offset, due))
    return state._replace(layers=tuple(layers))


def committing(model: Model) -> list[int]:
    """The layers that `commit` is about."""
    return [i for i, kind in enumerate(model.config.layer_types) if kind == "bmojo" and model.config.n_eidetic]
