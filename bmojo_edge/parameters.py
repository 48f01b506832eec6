"""The names and shapes of every parameter of a model, from its config: the contract of checkpoints and twins.

Shapes are those of PyTorch's `nn.Linear` (out, in). docs/checkpoints.md explains each name, docs/mixers.md
those of the mixers.
"""

from __future__ import annotations

import math

from bmojo_edge.config import SSM, Config
from bmojo_edge.ssm_config import delta_sizes, mamba2_sizes

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
    if not ssm.conv_bias:
        del shapes["conv.bias"]
    if ssm.bias:
        shapes |= {"in_proj.bias": (2 * d_inner,), "out_proj.bias": (d,)}
    if ssm.dt_bc_norm:
        shapes |= {"dt_norm.weight": (r,), "B_norm.weight": (n,), "C_norm.weight": (n,)}
    return shapes


def _mamba2(config: Config, ssm: SSM) -> Shapes:
    size, d = mamba2_sizes(ssm), config.d_model
    channels, h = sum(size.widths), size.heads
    rows = size.d_inner + channels + h  # z, x, B, C, dt
    shapes: Shapes = {
        "in_proj.weight": (rows, d),
        "conv.weight": (channels, ssm.d_conv),
        "dt_bias": (h,),
        "A_log": (h,),
        "D": (h,),
        "norm.weight": (size.d_inner,),
        "out_proj.weight": (d, size.d_inner),
    }
    if ssm.conv_bias:
        shapes["conv.bias"] = (channels,)
    if ssm.bias:
        shapes |= {"in_proj.bias": (rows,), "out_proj.bias": (d,)}
    if ssm.bc_norm:
        shapes |= {"B_norm.weight": (size.d_state,), "C_norm.weight": (size.d_state,)}
    return shapes


def _delta(config: Config, ssm: SSM, convolved: str) -> Shapes:
    """What gdn and gka share: projections, convolutions of the named ones, expansion of k and v, output."""
    size, d = delta_sizes(ssm), config.d_model
    wide = size.heads * size.head_dim
    widths = dict(zip("qkv", size.widths, strict=True))
    shapes: Shapes = {f"{x}_proj.weight": (width, d) for x, width in widths.items()}
    shapes |= {f"{x}_conv.weight": (widths[x], ssm.d_conv) for x in convolved}
    if ssm.conv_bias:
        shapes |= {f"{x}_conv.bias": (widths[x],) for x in convolved}
    if size.expands_kv:
        rank = ssm.kv_proj_rank
        assert rank is not None
        for x, heads in (("k", size.k_heads), ("v", size.v_heads)):
            shapes |= {f"proj_{x}.linearA.weight": (rank, widths[x]), f"proj_{x}.linearB.weight": (wide, rank)}
            if ssm.kv_learnable_residual:
                shapes[f"{x}_rep"] = (size.heads, heads)
    if ssm.use_gate:
        shapes["g_proj.weight"] = (wide, d)
    return shapes | {"o_norm.weight": (size.head_dim,), "o_proj.weight": (d, wide)}


def _gdn(config: Config, ssm: SSM) -> Shapes:
    h, d = delta_sizes(ssm).heads, config.d_model
    gates: Shapes = {"b_proj.weight": (h, d), "gk_proj.weight": (h, d), "A_log": (h,), "dt_bias": (h,)}
    return _delta(config, ssm, "qkv" if ssm.use_short_conv else "") | gates


def _gka(config: Config, ssm: SSM) -> Shapes:
    h, d = delta_sizes(ssm).heads, config.d_model
    shapes = _delta(config, ssm, "qkv" if ssm.use_v_conv else "qk")
    if ssm.use_forgetting_gate:
        shapes |= {"a_proj.weight": (h, d), "A_log": (h,), "dt_bias": (h,)}
    if ssm.use_beta_gate:
        shapes |= {"b_proj.weight": (h, d), "b_proj.bias": (h,)}
    if ssm.use_alpha_connection:
        shapes |= {"alpha_proj.weight": (h, d), "alpha_proj.bias": (h,)}
    return shapes


SSM_SHAPES = {"mamba": _mamba, "mamba2": _mamba2, "gdn": _gdn, "gka": _gka}


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
