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

from bmojo_edge.mlx.layout import Step, as_mask, live_slots
from bmojo_edge.mlx.memory import promote
from bmojo_edge.mlx.mixers.attention import grown
from bmojo_edge.state import BMojoState, State

if TYPE_CHECKING:
    from bmojo_edge.mlx.model import Model

TRACES = 64  # compiled forms of the step that are kept: a growing cache needs a new one every GROWTH tokens


class Decoder:
    """Moves a model's state by one token.

    compiles: whether steps go through `mx.compile`; traces: how often a step's graph was built in Python.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.traces = model, 0
        # Fusing saves launches of GPU kernels; on a CPU it saves little, and g++ takes its time first.
        self.compiles = mx.default_device() == mx.Device(mx.gpu)
        config = model.config
        self._eidetic = tuple(i for i, kind in enumerate(config.layer_types) if kind == "bmojo" and config.n_eidetic)
        self._steps: dict[Any, Callable[..., Any]] = {}

    def __call__(self, token: mx.array, state: State, active: Any) -> tuple[mx.array, State]:
        """Logits (b, v) after token (b,), and the state, see `Model.decode_one_token`."""
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
        tokens, layers = int(positions[moves].max()) + 1, list(state.layers)
        for i in config.growing_layers:
            layers[i] = grown(layers[i], tokens)
        due = moves & (positions % config.chunk_size == 0)
        if self._eidetic and due.any():
            self._promote(layers, state, as_mask(due))
        rows = None if moves.all() else mx.array(np.where(moves, np.arange(b), np.flatnonzero(moves)[0]))
        opening = bool((positions[moves] < config.n_sinks).any())
        live = live_slots(config, int(positions.max()) + 1)
        logits, moved = self._step(token, tuple(layers), state.position, state.offset, rows, live, opening)
        return logits, State(moved, mx.array(positions + moves), state.offset)

    def _compiled(self, key: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, compiled where that pays, with the parameters as further inputs; few are kept."""
        if not self.compiles:
            return function
        if key not in self._steps:
            if len(self._steps) >= TRACES:
                self._steps.pop(next(iter(self._steps)))
            self._steps[key] = mx.compile(function, inputs=[self.model])
        return self._steps[key]

    def _promote(self, layers: list[Any], state: State, due: mx.array) -> None:
        """Promotion in `due` rows, evaluated before the step: rings that are still to be read would be copied by it."""
        config = self.model.config

        def promoted(states: list[BMojoState], position: mx.array, offset: mx.array, due: mx.array) -> list[Any]:
            return [promote(config, layer, position, offset, due) for layer in states]

        step = self._compiled(("promote", due.size), promoted)
        kept = step([layers[i] for i in self._eidetic], state.position, state.offset, due)
        mx.eval(kept)
        for i, eidetic in zip(self._eidetic, kept, strict=True):
            layers[i] = layers[i]._replace(eidetic=eidetic)

    def _traced(self, token: mx.array, state: State, active: Any) -> tuple[mx.array, State]:
        """The same in one graph that fits every position."""
        config = self.model.config
        if config.growing_layers:
            raise ValueError("decode_one_token: the cache of full attention grows on the host and cannot be traced")
        if active is not None:
            raise ValueError("decode_one_token: `active` is decided on the host and cannot be traced")
        due = state.position % config.chunk_size == 0 if self._eidetic else None
        self.traces += 1
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
        """The step of rows with at most `live` written slots."""
        model = self.model

        def step(token: mx.array, layers: Any, position: mx.array, offset: mx.array, rows: Any) -> Any:
            self.traces += 1
            return run_step(model, token, layers, Step(model.config, position, offset, rows, live, opening))

        shapes = tuple(layers[i].k.shape for i in model.config.growing_layers)
        return self._compiled((token.size, rows is None, live, opening, shapes), step)(
            token, layers, position, offset, rows
        )


def run_step(model: Model, token: mx.array, states: tuple[Any, ...], step: Step) -> tuple[mx.array, tuple[Any, ...]]:
    """Logits (b, v) after one token (b,) of each row, and the layers' states."""
    token = token if step.active is None else mx.where(step.active, token, 0)
    h, added, moved = model.embed(token), None, []
    for layer, state in zip(model.layers, states, strict=True):
        h, added, state = layer.step(h, added, state, step)
        moved.append(state)
    out = model.norm(h) if added is None else model.norm.of_sum(h, added, h.dtype)[1]
    out = out if step.active is None else mx.where(step.active[:, None], out, mx.array(0, out.dtype))
    return model.head(out), tuple(moved)
