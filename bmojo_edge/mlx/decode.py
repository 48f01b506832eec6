"""One token at a time: what the host decides before a step, and the step itself, a pure function that may be compiled.

The host knows each row's position, so it grows caches, promotes eidetic tokens at chunk borders and picks how many
slots are read; none of it waits for the device. Within the step positions are arrays: nothing is traced anew as they
move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from bmojo_edge.mlx.layout import LIVE_STEP, Step, as_mask
from bmojo_edge.mlx.memory import promote
from bmojo_edge.mlx.mixers.attention import grown
from bmojo_edge.state import State, leaves

if TYPE_CHECKING:
    from bmojo_edge.mlx.model import Model

TRACES = 64  # compiled forms of the step that are kept: a growing cache needs a new one every GROWTH tokens


class Decoder:
    """Moves a model's state by one token."""

    def __init__(self, model: Model) -> None:
        self.model, self.traces = model, 0
        # Fusing saves launches of GPU kernels; on a CPU it saves little, and g++ takes its time first.
        self.compiled = mx.default_device() == mx.Device(mx.gpu)
        config = model.config
        self._eidetic = tuple(i for i, kind in enumerate(config.layer_types) if kind == "bmojo" and config.n_eidetic)
        self._steps: dict[Any, Callable[..., Any]] = {}

    def __call__(self, token: mx.array, state: State, active: Any) -> tuple[mx.array, State]:
        config, b = self.model.config, token.size
        try:
            positions = np.array(state.position)
        except ValueError:  # traced by mx.compile
            return self._traced(token, state, active)
        moves = np.ones(b, bool) if active is None else np.asarray(active, bool)
        if moves.shape != (b,):
            raise ValueError(f"active: must be {b} truth values, got shape {moves.shape}")
        if not moves.any():
            return mx.zeros((b, config.vocab_size), self.model.norm.weight.dtype), state
        layers, used = list(state.layers), int(positions[moves].max()) + 1
        for i in config.growing_layers:
            layers[i] = grown(layers[i], used)
        due = moves & (positions % config.chunk_size == 0)
        if self._eidetic and due.any():
            self._promote(layers, state, as_mask(due))
        first = int(np.flatnonzero(moves)[0])
        rows = None if moves.all() else mx.array(np.where(moves, np.arange(b), first))
        opening = bool((positions[moves] < config.n_sinks).any())
        live = -(-int(positions.max() + 1) // LIVE_STEP) * LIVE_STEP
        logits, layers = self._step(token, tuple(layers), state.position, state.offset, rows, live, opening)
        return logits, State(layers, mx.array(positions + moves), state.offset)

    def _promote(self, layers: list[Any], state: State, due: mx.array) -> None:
        """Promotion in `due` rows, evaluated before the step: rings that are still to be read would be copied by it."""
        for i in self._eidetic:
            eidetic = promote(self.model.config, layers[i], state.position, state.offset, due)
            layers[i] = layers[i]._replace(eidetic=eidetic)
        mx.eval([layers[i].eidetic for i in self._eidetic])

    def _traced(self, token: mx.array, state: State, active: Any) -> tuple[mx.array, State]:
        """The same in one graph that fits every position."""
        config = self.model.config
        if config.growing_layers:
            raise ValueError("decode_one_token: the cache of full attention grows on the host and cannot be traced")
        if active is not None:
            raise ValueError("decode_one_token: `active` is decided on the host and cannot be traced")
        due = state.position % config.chunk_size == 0 if self._eidetic else None
        step = Step(config, state.position, state.offset, promotes=due)
        logits, layers = run_step(self.model, token, state.layers, step)
        return logits, State(layers, state.position + 1, state.offset)

    def _step(
        self,
        token: mx.array,
        layers: tuple[Any, ...],
        position: mx.array,
        offset: mx.array,
        rows: mx.array | None,
        live: int,
        opening: bool,
    ) -> tuple[mx.array, tuple[Any, ...]]:
        """The step of rows with at most `live` tokens, compiled where that pays."""
        model = self.model

        def step(token: mx.array, layers: Any, position: mx.array, offset: mx.array, rows: Any) -> Any:
            self.traces += 1
            return run_step(model, token, layers, Step(model.config, position, offset, rows, live, opening))

        if not self.compiled:
            return step(token, layers, position, offset, rows)
        shapes = tuple(x.shape for _, x in leaves(layers)) if model.config.growing_layers else ()
        key = (token.size, rows is None, live, opening, shapes)
        if key not in self._steps:
            if len(self._steps) >= TRACES:
                self._steps.pop(next(iter(self._steps)))
            self._steps[key] = mx.compile(step, inputs=[dict(model)])
        return self._steps[key](token, layers, position, offset, rows)


def run_step(model: Model, token: mx.array, states: tuple[Any, ...], step: Step) -> tuple[mx.array, tuple[Any, ...]]:
    """Logits (b, v) after one token (b,) of each row, and the layers' states."""
    token = token if step.active is None else mx.where(step.active, token, 0)
    h, moved = model.embed(token), []
    for layer, state in zip(model.layers, states, strict=True):
        h, state = layer.step(h, state, step)
        moved.append(state)
    out = model.norm(h)
    out = out if step.active is None else mx.where(step.active[:, None], out, mx.array(0, out.dtype))
    return model.head(out), tuple(moved)
