"""One layer: a mixer and its feed-forward, each behind a norm and added to the residual stream."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

from bmojo_edge.config import Config
from bmojo_edge.mlx.layers import MLP, MixtureOfExperts, RMSNorm
from bmojo_edge.mlx.layout import Layout, Step
from bmojo_edge.mlx.mixers import Attention, BMojo, Remembered, ssm_mixer


class BlockResult(NamedTuple):
    """A layer's output, its state afterwards, and what its eidetic memory did."""

    out: mx.array  # (b, t, d)
    state: Any
    remembered: Remembered | None


def mixer_of(config: Config, layer: int, dtype: mx.Dtype) -> Any:
    """The mixer a layer's type names."""
    kind, ssm = config.layer_types[layer], config.ssm_of(layer)
    if kind == "attention":
        return Attention(config, layer, dtype)
    if kind == "bmojo":
        return BMojo(config, layer, dtype)
    assert ssm is not None
    return ssm_mixer(config, ssm, dtype)


class Block(nn.Module):
    """h + mixer(norm(h)), then, where d_ff > 0, h + mlp(norm(h))."""

    def __init__(self, config: Config, layer: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.mixer = mixer_of(config, layer, dtype)
        if config.d_ff:
            self.mlp_norm = RMSNorm(config.d_model, config.norm_eps, dtype)
            dense = config.experts_of(layer) is None
            self.mlp = MLP(config, dtype) if dense else MixtureOfExperts(config, layer, dtype)

    def _normed(self, h: mx.array) -> mx.array:
        """What the mixer reads: unrounded where innovation looks at it."""
        unrounded = isinstance(self.mixer, BMojo) and self.mixer.reads_input
        return self.norm(h.astype(mx.float32) if unrounded else h)

    def _add_mlp(self, h: mx.array) -> mx.array:
        return h + self.mlp(self.mlp_norm(h)) if "mlp" in self else h

    def __call__(self, h: mx.array, state: Any, layout: Layout, forced: mx.array | None = None) -> BlockResult:
        """h (b, t, d) after the layer's `state`; forced (b, c, e): eidetic sets to take."""
        u, remembered = self._normed(h), None
        if isinstance(self.mixer, BMojo):
            out, state, remembered = self.mixer(u, state, layout, forced)
        else:
            out, state = self.mixer(u, state, layout)
        return BlockResult(self._add_mlp(h + out), state, remembered)

    def step(self, h: mx.array, state: Any, step: Step) -> tuple[mx.array, Any]:
        """One token: h (b, d)."""
        out, state = self.mixer.step(self._normed(h), state, step)
        return self._add_mlp(h + out), state
