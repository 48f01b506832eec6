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

    def _read_in(self, h: mx.array) -> mx.Dtype:
        """The dtype in which the mixer reads: unrounded where innovation looks at it."""
        return mx.float32 if isinstance(self.mixer, BMojo) and self.mixer.reads_input else h.dtype

    def __call__(self, h: mx.array, state: Any, layout: Layout, forced: mx.array | None = None) -> BlockResult:
        """h (b, t, d) after the layer's `state`; forced (b, c, e): eidetic sets to take."""
        u, remembered = self.norm(h.astype(self._read_in(h))), None
        if isinstance(self.mixer, BMojo):
            out, state, remembered = self.mixer(u, state, layout, forced)
        else:
            out, state = self.mixer(u, state, layout)
        h = h + out
        return BlockResult(h + self.mlp(self.mlp_norm(h)) if "mlp" in self else h, state, remembered)

    def step(self, h: mx.array, added: mx.array | None, state: Any, step: Step) -> tuple[mx.array, mx.array, Any]:
        """One token: h (b, d), to which `added` is still to be added; h, what is to be added to it, and the state.

        A sum and the norm after it are one operation, across layers.
        """
        dtype = self._read_in(h)
        h, u = (h, self.norm(h.astype(dtype))) if added is None else self.norm.of_sum(h, added, dtype)
        out, state = self.mixer.step(u, state, step)
        if "mlp" not in self:
            return h, out, state
        h, u = self.mlp_norm.of_sum(h, out, h.dtype)
        return h, self.mlp(u), state
