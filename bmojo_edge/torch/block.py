"""One layer: a mixer and its feed-forward, each behind a norm and added to the residual stream."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bmojo_edge.config import Config
from bmojo_edge.state import layer_spec
from bmojo_edge.torch.layers import MLP, MixtureOfExperts, RMSNorm
from bmojo_edge.torch.layout import Layout, Step, fresh_state
from bmojo_edge.torch.mixers import GDN, GKA, Attention, BMojo, Mamba, Mamba2, Remembered, ssm_mixer

Mixer = Attention | BMojo | Mamba | Mamba2 | GDN | GKA


class BlockResult(NamedTuple):
    """A layer's output, its state afterwards, and what its eidetic memory did."""

    out: Tensor  # (b, t, d)
    state: Any
    remembered: Remembered | None


def mixer_of(config: Config, layer: int, dtype: torch.dtype) -> Mixer:
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

    def __init__(self, config: Config, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.state_spec = layer_spec(config, layer)
        self.norm = RMSNorm(config.d_model, config.norm_eps, dtype)
        self.mixer = mixer_of(config, layer, dtype)
        self.mlp_norm, self.mlp = None, None
        if config.d_ff:
            self.mlp_norm = RMSNorm(config.d_model, config.norm_eps, dtype)
            self.mlp = (
                MLP(config, dtype) if config.experts_of(layer) is None else MixtureOfExperts(config, layer, dtype)
            )

    def residual_weights(self) -> list[Tensor]:
        """Weights of the projections whose output is added to the residual stream."""
        mixer, mlp = self.mixer, self.mlp
        found = [mixer.out_proj.weight if isinstance(mixer, Mamba | Mamba2) else mixer.o_proj.weight]
        if mlp is not None:
            found.append((mlp.experts if isinstance(mlp, MixtureOfExperts) else mlp).down_proj.weight)
        return found

    def _add_mlp(self, h: Tensor) -> Tensor:
        if self.mlp is None or self.mlp_norm is None:
            return h
        return h + self.mlp(self.mlp_norm(h).to(h.dtype))

    def forward(self, h: Tensor, state: Any, layout: Layout, forced: Tensor | None = None) -> BlockResult:
        """h (b, t, d) after the layer's `state`; forced (b, c, e): eidetic sets to take.

        state None: sequences begin here and nobody asks what they leave, as in training.
        """
        kept, u, remembered = state is not None, self.norm(h), None
        state = state if kept else fresh_state(self.state_spec, h.shape[0], h.dtype, h)
        if isinstance(self.mixer, BMojo):
            out, state, remembered = self.mixer(u, state, layout, forced)
        else:
            out, state = self.mixer(u, state, layout)
        h = self._add_mlp(h + out.to(h.dtype))
        return BlockResult(h, state, remembered) if kept else BlockResult(h, None, None)

    def step(self, h: Tensor, state: Any, step: Step) -> tuple[Tensor, Any]:
        """One token: h (b, d)."""
        out, state = self.mixer.step(self.norm(h), state, step)
        return self._add_mlp(h + out.to(h.dtype)), state
