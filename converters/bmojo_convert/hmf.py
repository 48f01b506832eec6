"""Hybrid Model Factory's hybrids of Llama, Qwen2 and Qwen3: what their config.json means to us.

Its public code is the specification: the pattern of layers, one table of options for each kind of mixer, sizes that
follow from the Transformer the model was made from (docs/mixers.md). Knows fields and names, not files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bmojo_convert.fields import Content, refuse_activation, require_integers
from bmojo_convert.names import HMF, ConvertError, Table
from bmojo_convert.rope import from_huggingface
from bmojo_edge.config import SSM, Config
from bmojo_edge.ssm_config import default_of, fields_of, resolve

_LAYERS = {"*": "attention", "SWA": "attention", "BMF": "bmojo", "M2": "mamba2", "GDN": "gdn", "GKA": "gka"}
_TRAINING = ("*DA", "BMF*", "M2*", "GDN*", "GKA*", "SWA*", "GDN>GKA")
_MIXERS = {
    "mamba2": "mamba2", "gdn": "gdn", "gated_deltanet": "gdn", "gka": "gka", "gated_kalmanet": "gka",
}  # fmt: skip
_MODULES = {"mamba2": "mamba", "gdn": "gdn", "gka": "gka"}

# Options by table, theirs to ours, and fields that change nothing here.
_SHARED = {
    "use_gate": "use_gate", "conv_size": "d_conv", "norm_eps": "norm_eps", "kv_proj_rank": "kv_proj_rank",
    "kv_learnable_residual": "kv_learnable_residual",
}  # fmt: skip
_OPTIONS: dict[str, dict[str, str]] = {
    "mamba2_config": {"use_qk_norm": "bc_norm"},
    "gdn_config": {
        **_SHARED, "use_short_conv": "use_short_conv", "allow_neg_eigval": "allow_neg_eigval", "conv_bias": "conv_bias",
    },
    "gka_config": {
        **_SHARED,
        **{
            name: name
            for name in (
                "use_alpha_connection", "use_v_conv", "use_forgetting_gate", "use_forgetting_gate_kk", "gla_rescale",
                "num_iter", "ridge_strength", "use_beta_gate",
            )
        },
    },
}  # fmt: skip
_UNREAD = {"rms_norm_eps", "n_layer", "intermediate_size", "hidden_act", "chunk_size", "bp_lambda"}


def _expected(content: Content) -> dict[str, dict[str, Any]]:
    """Fields that a table may hold but not choose: sizes of the Transformer, and options with one supported value."""
    d_model, h = content["hidden_size"], content["num_attention_heads"]
    g, p = content.get("num_key_value_heads") or h, content.get("head_dim") or d_model // h
    heads = {"hidden_size": d_model, "head_dim": p, "num_q_heads": h, "num_k_heads": g, "num_v_heads": g}
    return {
        "bmojo_config": {"hidden_size": d_model, "num_heads": h, "num_key_value_heads": g, "head_dim": p},
        "gdn_config": heads,
        "gka_config": {**heads, "solver_type": "chebyshev", "conv_bias": False, "num_sketches_per_head": 1},
        "mamba2_config": {
            "d_model": d_model, "d_inner": h * p, "d_xb": g * p, "d_conv": 4, "use_bias": False, "use_conv_bias": True,
            "xb_learnable_residual": False, "xb_proj_activation": False, "xb_proj_rank": None, "use_rotary_emb": False,
            "ssm_cfg": {"expand": 1, "ngroups": h, "d_state": p, "repeat_kv_before_conv": False},
            # Rotating B and C before the convolution would tie the output to absolute positions.
            "use_pos_emb": False, "use_pos_embed": False,
        },
        "swa_config": {},
    }  # fmt: skip


def fields(content: Content, where: str) -> dict[str, Any]:
    """Fields of our Config for a config.json of Hybrid Model Factory, but for tie_embeddings and dtype.

    Raises ConvertError naming the field that is wrong or not supported.
    """
    require_integers(
        content, where, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    )
    refuse_activation(content, where)
    symbols = _pattern(content, where)
    _refuse(content, symbols, where)
    bmojo = _table(content, "bmojo_config", where, "window_size", "tie_attn_weights", "ssm_mixer")
    mixer = str(bmojo.get("ssm_mixer", "mamba2"))
    if "BMF" in symbols and mixer.lower() not in _MIXERS:
        raise ConvertError(
            f"{where}: bmojo_config.ssm_mixer {mixer!r} is not supported; known are {', '.join(_MIXERS)}"
        )
    theta, scaling = from_huggingface(content, where)
    config: dict[str, Any] = {
        "vocab_size": content["vocab_size"],
        "d_model": content["hidden_size"],
        "layer_types": tuple(_LAYERS[symbol] for symbol in symbols),
        "d_ff": content["intermediate_size"],
        "n_heads": content["num_attention_heads"],
        "n_kv_heads": content.get("num_key_value_heads"),
        "head_dim": content.get("head_dim"),
        "attention_window": _windows(content, symbols, where),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": content.get("rms_norm_eps", 1e-6),
        "qk_norm": content["model_type"] == "hybrid_qwen3",
        "attention_bias": content["model_type"] == "hybrid_qwen2",
        "n_fading": 0,
    }
    kinds = [_LAYERS[symbol] for symbol in symbols if symbol in ("M2", "GDN", "GKA")]
    if "BMF" in symbols:
        window = bmojo.get("window_size", 2048)
        config |= {"window": window, "n_fading": window, "tie_kv": bool(bmojo.get("tie_attn_weights", True))}
        kinds.insert(0, _MIXERS[mixer.lower()])
    if kinds:
        config["ssm"] = _ssm(content, config, tuple(dict.fromkeys(kinds)), where)
    return config


def _pattern(content: Content, where: str) -> list[str]:
    """The symbols of the layers."""
    pattern = content.get("hybrid_override_pattern")
    if not isinstance(pattern, str):
        raise ConvertError(f"{where}: hybrid_override_pattern is missing or no text")
    symbols = pattern.split("-")
    for symbol in symbols:
        if symbol in _TRAINING:
            raise ConvertError(
                f"{where}: hybrid_override_pattern: {symbol!r} runs two mixers side by side to distil one into the "
                "other; it is a stage of training, not a model: let Hybrid Model Factory finish it (fused_to_standard)"
            )
        if symbol not in _LAYERS:
            raise ConvertError(f"{where}: hybrid_override_pattern: {symbol!r} is not one of {', '.join(_LAYERS)}")
    if len(symbols) != content["num_hidden_layers"]:
        layers = content["num_hidden_layers"]
        raise ConvertError(
            f"{where}: hybrid_override_pattern lists {len(symbols)} layers, num_hidden_layers is {layers}"
        )
    return symbols


def _refuse(content: Content, symbols: list[str], where: str) -> None:
    kind = content["model_type"]
    if content.get("mlp_bias") and kind == "hybrid_llama":
        raise ConvertError(f"{where}: mlp_bias: biases in the MLP are not supported")
    if content.get("attention_bias") and kind != "hybrid_qwen2":
        raise ConvertError(f"{where}: attention_bias: it gives o_proj a bias in {kind}, not supported")
    if "attention_bias" in content and kind == "hybrid_qwen2" and "BMF" in symbols:
        raise ConvertError(f"{where}: attention_bias: in {kind} B'MOJO layers alone read it, not supported")
    if "linear_num_key_heads" in content or "linear_num_value_heads" in content:
        raise ConvertError(f"{where}: linear_num_key_heads: hybrids of Qwen3-Next are not supported")


def _table(content: Content, name: str, where: str, *options: str) -> Mapping[str, Any]:
    """A table of options without those that are null; an option that is not known is refused by name."""
    given = content.get(name) or {}
    if not isinstance(given, Mapping):
        raise ConvertError(f"{where}: {name} must be a table, got {given!r}")
    _check_fixed(given, _expected(content)[name], {*options, *_UNREAD}, f"{where}: {name}")
    return {key: value for key, value in given.items() if value is not None}


def _check_fixed(given: Mapping[str, Any], expected: Mapping[str, Any], free: set[str], where: str) -> None:
    """Raise ConvertError for a field that is neither free nor as expected."""
    for key, value in given.items():
        if key in free or value is None:
            continue
        if key not in expected:
            raise ConvertError(f"{where}.{key} is not supported")
        if isinstance(expected[key], Mapping) and isinstance(value, Mapping):
            _check_fixed(value, expected[key], set(), f"{where}.{key}")
        elif value != expected[key]:
            raise ConvertError(f"{where}.{key} {value!r} is not supported; it must be {expected[key]!r}")


def _windows(content: Content, symbols: list[str], where: str) -> tuple[int | None, ...] | None:
    """How far each attention layer sees: window_size counts the token itself, as attention_window does."""
    if "SWA" not in symbols:
        return None
    reach = _table(content, "swa_config", where, "window_size").get("window_size")
    if reach is None:
        raise ConvertError(f"{where}: swa_config.window_size is missing")
    return tuple(reach if symbol == "SWA" else None for symbol in symbols)


def _ssm(content: Content, config: Mapping[str, Any], kinds: tuple[str, ...], where: str) -> dict[str, Any]:
    """One `ssm` table for every kind in the model, of which the first is that of the bmojo layers.

    A field that two kinds read must mean the same to both; left out, each takes its own default.
    """
    d_model, n_heads = config["d_model"], config["n_heads"]
    n_kv_heads, head_dim = config["n_kv_heads"] or n_heads, config["head_dim"] or d_model // n_heads
    given = {kind: _options(content, kind, (n_heads, n_kv_heads, head_dim), where) for kind in kinds}
    sizes = (d_model, n_heads, n_kv_heads, head_dim)
    concrete = {kind: resolve(SSM(kind=kind, **given[kind]), kind, *sizes) for kind in kinds}
    table: dict[str, Any] = {"kind": kinds[0]}
    for name in dict.fromkeys(name for options in given.values() for name in options):
        values = {kind: getattr(concrete[kind], name) for kind in kinds if name in fields_of(kind)}
        if len(set(values.values())) == 1:
            table[name] = values[next(iter(values))]
        elif any(value != default_of(kind, name) for kind, value in values.items()):
            said = ", ".join(f"{value!r} in {kind}" for kind, value in values.items())
            raise ConvertError(f"{where}: {name} differs ({said}); mixers of one model must share it here")
    return table


def _options(content: Content, kind: str, heads: tuple[int, int, int], where: str) -> dict[str, Any]:
    """The fields of one kind's table, as the model's config.json and its attention's sizes have them."""
    name = f"{kind}_config"
    table = _table(content, name, where, *_OPTIONS[name])
    found = {ours: table[theirs] for theirs, ours in _OPTIONS[name].items() if theirs in table}
    if kind != "mamba2":
        return found
    n_heads, n_kv_heads, head_dim = heads
    has_norm = content["model_type"] == "hybrid_qwen3" and found.get("bc_norm", True)
    return {
        "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim, "d_state": head_dim, "bc_norm": has_norm,
    }  # fmt: skip


# --- names ----------------------------------------------------------------------------------------------------------


def table(config: Config) -> Table:
    """The names of a model's tensors, and those that Hybrid Model Factory stores but never reads."""
    unread = []
    for kind in ("gdn", "gka"):
        layers = [
            i for i in range(len(config.layer_types)) if (ssm := config.ssm_of(i)) is not None and ssm.kind == kind
        ]
        for i in layers:
            ssm, module = config.ssm_of(i), re.escape(_places(config, i)["ssm"])
            assert ssm is not None
            if ssm.kv_proj_rank is not None:  # used where there are heads to expand, and then rows ask for them
                unread.append(rf"model\.layers\.{i}\.{module}\.(proj_[kv]\.linear[AB]\.weight|[kv]_rep)")
            if kind == "gka" and not ssm.use_forgetting_gate:
                unread.append(rf"model\.layers\.{i}\.{module}\.(a_proj\.weight|A_log|dt_bias)")
    return HMF._replace(ignored=(*HMF.ignored, *unread), places=_places)


def _places(config: Config, layer: int) -> dict[str, str]:
    """The modules that a layer's mixer and its SSM are."""
    kind, ssm = config.layer_types[layer], config.ssm_of(layer)
    if ssm is not None:
        module = _MODULES[ssm.kind]
        return (
            {"mixer": "bmojo_f.bmojo_attn", "ssm": f"bmojo_f.{module}"}
            if kind == "bmojo"
            else dict.fromkeys(("mixer", "ssm"), module)
        )
    module = "self_attn" if config.attention_window_of(layer) is None else "swa"
    return {"mixer": module, "ssm": module}
