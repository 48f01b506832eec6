"""`Model` as mlx-lm calls it: tokens and caches in, logits out. The state is kept in mlx-lm's caches between calls.

Used by bmojo_model.py where bmojo_edge is installed. A layer's cache holds its position and then the leaves of its
state in order; the positions of eidetic slots count from 1 there, because mlx-lm fills empty rows with zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache

from bmojo_edge.config import Config
from bmojo_edge.mlx.bmojo_model import FullAttention, PlainModel, Run
from bmojo_edge.mlx.layout import layout_of
from bmojo_edge.mlx.model import Model
from bmojo_edge.state import Leaf, State, layer_spec, leaves, map_leaves

_COUNTED = "eidetic.positions"


class EngineModel(Model):
    """`Model` with mlx-lm's caches: full attention grows in its `KVCache`; parameters are those of the folder."""

    quant_predicate, cast_predicate = PlainModel.quant_predicate, PlainModel.cast_predicate

    def __init__(self, args: Any) -> None:
        names = {field.name for field in dataclasses.fields(Config)}
        config = Config.from_json({key: value for key, value in vars(args).items() if key in names})
        super().__init__(config)
        self.model_type = "bmojo"
        for i in config.growing_layers:
            self.layers[i].mixer = FullAttention(args)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]: mlx-lm's calling convention
        self, inputs: mx.array, cache: list[Any] | None = None
    ) -> mx.array:
        """Logits (b, t, v) of inputs (b, t) after the cache, which moves on."""
        cache = self.make_cache() if cache is None else cache
        run = Run(cache, *inputs.shape)
        state = self._state(cache, run)
        if self.config.growing_layers:
            logits, state = self._hybrid(inputs, state, cache, run)
        elif run.t == 1 and run.host_real.all():
            logits, state = self.decode_one_token(inputs[:, 0], state)
            logits = logits[:, None]
        else:
            logits, state = self.forward(inputs, state, run.lengths)
        for layer, c in zip(state.layers, cache, strict=True):
            if isinstance(c, ArraysCache):
                c.cache = [state.position, *(x + 1 if name == _COUNTED else x for name, x in leaves(layer))]
                c.advance(run.t)
        return logits

    def _hybrid(self, inputs: mx.array, state: State, cache: list[Any], run: Run) -> tuple[mx.array, State]:
        """`forward` where full attention reads and moves its own cache."""
        layout = layout_of(self.config, run.t, run.start.tolist(), state.offset, run.lengths.tolist())
        h, layers = self.embed(inputs), []
        for layer, old, c in zip(self.layers, state.layers, cache, strict=True):
            if isinstance(layer.mixer, FullAttention):
                h = h + layer.mixer(layer.norm(h), c)
                h = h + layer.mlp(layer.mlp_norm(h)) if "mlp" in layer else h
            else:
                h, old, _ = layer(h, old, layout)
            layers.append(old)
        return self.head(self.norm(h)), State(tuple(layers), run.end, state.offset)

    def make_cache(self) -> list[Any]:
        """Empty caches."""
        sizes = [1 + sum(1 for _ in leaves(layer_spec(self.config, i))) for i in range(len(self.layers))]
        return [KVCache() if i in self.config.growing_layers else ArraysCache(n) for i, n in enumerate(sizes)]

    def _state(self, cache: list[Any], run: Run) -> State:
        """The caches' arrays as a state; empty caches are a fresh one."""
        b = len(run.start)
        fresh = self.init_state(b)
        layers = tuple(
            old
            if i in self.config.growing_layers or c.empty()
            else _restored(layer_spec(self.config, i, b), iter(c.cache[1:]))
            for i, (old, c) in enumerate(zip(fresh.layers, cache, strict=True))
        )
        return State(layers, mx.array(run.start), fresh.offset)


def _restored(spec: Any, values: Iterator[mx.array]) -> Any:
    """A layer's state with the given leaves."""
    found = [x - 1 if name == _COUNTED else x for (name, _), x in zip(leaves(spec), values, strict=True)]
    rest = iter(found)

    def take(leaf: Leaf) -> mx.array:
        return next(rest)

    return map_leaves(take, spec)
