"""The names and shapes of every parameter of a model, from its config: the contract of checkpoints and twins.

Shapes are those of PyTorch's `nn.Linear` (out, in). docs/checkpoints.md explains each name.
"""

from __future__ import annotations

import math

from bmojo_edge.config import SSM, Config

Shapes = dict[str, tuple[int, ...]]


def _mamba(config: Config, ssm: SSM) -> Shapes:
    d, d_inner, n, r = config.d_model, ssm.expand * config.d_model, ssm.d_state, ssm.dt_rank
    assert r is not None
    shapes: Shapes = {
        "in_proj.weight": (2 * d_inner, d),
        "conv.weight": (d_inner, ssm.d_conv),
        "conv.bias": (d_inner,),
        "x_proj.weight": (r + 2 * n, d_inner),
        "dt_proj.weight": (d_inner, r),
        "dt_proj.bias": (d_inner,),
        "A_log": (d_inner, n),
        "D": (d_inner,),
        "out_proj.weight": (d, d_inner),
    }
    if ssm.dt_bc_norm:
        shapes |= {"dt_norm.weight": (r,), "B_norm.weight": (n,), "C_norm.weight": (n,)}
    return shapes


SSM_SHAPES = {"mamba": _mamba}


def _projections(config: Config) -> Shapes:
    """Query, key and value projections with their biases and per-head norms."""
    d, p = config.d_model, config.d_head
    rows = {"q": config.n_heads * p, "k": config.kv_heads * p, "v": config.kv_heads * p}
    shapes: Shapes = {f"{x}_proj.weight": (n, d) for x, n in rows.items()}
    if config.attention_bias:
        shapes |= {f"{x}_proj.bias": (n,) for x, n in rows.items()}
    if config.qk_norm:
        shapes |= {"q_norm.weight": (p,), "k_norm.weight": (p,)}
    return shapes


def _mixer(config: Config, layer: int) -> Shapes:
    kind, ssm = config.layer_types[layer], config.ssm_of(layer)
    if kind not in ("attention", "bmojo"):
        assert ssm is not None
        return SSM_SHAPES[ssm.kind](config, ssm)
    shapes = _projections(config) | {"o_proj.weight": (config.d_model, config.n_heads * config.d_head)}
    if kind == "bmojo" and ssm is not None:
        if not config.tie_kv:
            shapes |= {f"fading.{name}": shape for name, shape in _projections(config).items()}
        shapes |= {f"ssm.{name}": shape for name, shape in SSM_SHAPES[ssm.kind](config, ssm).items()}
    return shapes


def _mlp(config: Config, layer: int) -> Shapes:
    d, ff, experts = config.d_model, config.d_ff, config.experts_of(layer)
    dense = {"gate_proj.weight": (ff, d), "up_proj.weight": (ff, d), "down_proj.weight": (d, ff)}
    if experts is None:
        return {f"mlp.{name}": shape for name, shape in dense.items()}
    routed = {f"mlp.experts.{name}": (experts.n, *shape) for name, shape in dense.items()}
    return {"mlp.router.weight": (experts.n, d), **routed}


def layer_shapes(config: Config, layer: int) -> Shapes:
    """Parameters of one layer, named without the `layers.{i}.` prefix."""
    shapes: Shapes = {"norm.weight": (config.d_model,)}
    shapes |= {f"mixer.{name}": shape for name, shape in _mixer(config, layer).items()}
    if config.d_ff:
        shapes |= {"mlp_norm.weight": (config.d_model,), **_mlp(config, layer)}
    return shapes


def parameter_shapes(config: Config) -> Shapes:
    """Every parameter of the model."""
    v, d = config.vocab_size, config.d_model
    shapes: Shapes = {"embed.weight": (v, d)}
    for i in range(len(config.layer_types)):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer_shapes(config, i).items()}
    shapes["norm.weight"] = (d,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (v, d)
    return shapes


def parameter_count(config: Config) -> int:
    """Number of parameters, shared embeddings counted once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())
