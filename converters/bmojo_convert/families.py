"""Model families of Hugging Face Transformers: what their config.json means to us, and their table of names.

Missing fields have the defaults of the family's class in transformers; what we cannot compute is refused by name.
Knows fields, not files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bmojo_convert import hmf
from bmojo_convert.fields import Content, refuse_activation, require_integers
from bmojo_convert.names import HF_JAMBA, HF_MAMBA, HF_MAMBA2, HF_TRANSFORMER, ConvertError, Table
from bmojo_convert.rope import from_huggingface
from bmojo_edge.config import Config


class Family(NamedTuple):
    """How to read one model_type.

    defaults: fields where config.json is silent; fields: those of our Config but for tie_embeddings and dtype;
    table: the names of a model's tensors; embed: that of the embedding; in_transformers: whether it can be asked.
    """

    defaults: Content
    fields: Callable[[Content, str], dict[str, Any]]
    table: Callable[[Config], Table]
    embed: str = "model.embed_tokens.weight"
    in_transformers: bool = True


# --- Transformers ---------------------------------------------------------------------------------------------------


def _transformer(content: Content, where: str) -> dict[str, Any]:
    require_integers(
        content, where, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    )
    refuse_activation(content, where)
    if content.get("mlp_bias"):
        raise ConvertError(f"{where}: mlp_bias: biases in the MLP are not supported")
    if content.get("attention_bias") and content["model_type"] in ("llama", "qwen3"):
        raise ConvertError(f"{where}: attention_bias: it gives o_proj a bias in {content['model_type']}, not supported")
    n_layers = content["num_hidden_layers"]
    theta, scaling = from_huggingface(content, where)
    return {
        "vocab_size": content["vocab_size"],
        "d_model": content["hidden_size"],
        "layer_types": ("attention",) * n_layers,
        "d_ff": content["intermediate_size"],
        "n_heads": content["num_attention_heads"],
        "n_kv_heads": content.get("num_key_value_heads"),
        "head_dim": content.get("head_dim"),
        "attention_window": _windows(content, n_layers, where),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": content.get("rms_norm_eps", 1e-6),
        "qk_norm": content["model_type"] == "qwen3",
        "attention_bias": content["model_type"] == "qwen2",
    }


def _windows(content: Content, n_layers: int, where: str) -> int | tuple[int | None, ...] | None:
    """How far each layer sees: transformers' sliding_window counts the token itself, as attention_window does."""
    kind, reach = content["model_type"], content.get("sliding_window")
    if kind == "llama":
        return None
    if kind == "mistral":
        return reach
    reach = reach if content.get("use_sliding_window", False) else None
    first = content.get("max_window_layers", 28)
    types = content.get("layer_types")
    if types is None:
        types = ["sliding_attention" if reach and i >= first else "full_attention" for i in range(n_layers)]
    unknown = sorted({*map(str, types)} - {"sliding_attention", "full_attention"})
    if unknown:
        raise ConvertError(f"{where}: layer_types: {unknown[0]!r} is not supported")
    if len(types) != n_layers:
        raise ConvertError(f"{where}: layer_types lists {len(types)} layers, num_hidden_layers is {n_layers}")
    if "sliding_attention" in types and reach is None:
        raise ConvertError(f"{where}: layer_types has sliding_attention, but sliding_window is not set or not in use")
    windows = tuple(reach if kind == "sliding_attention" else None for kind in types)
    return windows[0] if len(set(windows)) == 1 else windows


# --- Mamba and Mamba-2 ----------------------------------------------------------------------------------------------


def _backbone(content: Content, where: str, kind: str, ssm: Mapping[str, Any]) -> dict[str, Any]:
    require_integers(content, where, "vocab_size", "hidden_size", "num_hidden_layers", "state_size", "conv_kernel")
    refuse_activation(content, where)
    shared = {
        "kind": kind, "d_state": content["state_size"], "d_conv": content["conv_kernel"],
        "bias": content["use_bias"], "conv_bias": content["use_conv_bias"],
    }  # fmt: skip
    return {
        "vocab_size": content["vocab_size"],
        "d_model": content["hidden_size"],
        "layer_types": (kind,) * content["num_hidden_layers"],
        "n_fading": 0,
        "norm_eps": content["layer_norm_epsilon"],
        "ssm": {**shared, **ssm},
    }


def _mamba(content: Content, where: str) -> dict[str, Any]:
    rank = None if content["time_step_rank"] == "auto" else content["time_step_rank"]
    return _backbone(content, where, "mamba", {"expand": _whole(content, "expand", where), "dt_rank": rank})


def _mamba2(content: Content, where: str) -> dict[str, Any]:
    require_integers(content, where, "num_heads", "head_dim", "n_groups")
    ssm = {
        "n_heads": content["num_heads"],
        "head_dim": content["head_dim"],
        "n_groups": content["n_groups"],
        "expand": _whole(content, "expand", where),
        "norm_eps": content["layer_norm_epsilon"],
        "dt_limit": _dt_limit(content["time_step_limit"], where),
    }
    return _backbone(content, where, "mamba2", ssm)


def _whole(content: Content, name: str, where: str) -> int:
    """A number that older files write as a float; transformers cuts off what follows the point of the width."""
    value = content[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or value != int(value):
        raise ConvertError(f"{where}: {name} {value!r} is not supported; it must be a whole number")
    return int(value)


def _dt_limit(given: Any, where: str) -> tuple[float, float | None]:
    """time_step_limit, whose infinity is null in ours, and in JSON `Infinity` or transformers' own spelling of it."""
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise ConvertError(f"{where}: time_step_limit must be two numbers, got {given!r}")
    try:
        low, high = (float(x["__float__"] if isinstance(x, Mapping) else x) for x in given)
    except (KeyError, TypeError, ValueError):
        raise ConvertError(f"{where}: time_step_limit must be two numbers, got {given!r}") from None
    return low, None if high == math.inf else high


# --- Jamba ----------------------------------------------------------------------------------------------------------


def _jamba(content: Content, where: str) -> dict[str, Any]:
    periods = ("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset")
    require_integers(
        content, where, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_experts", *periods,
    )  # fmt: skip
    refuse_activation(content, where)
    if content.get("sliding_window") is not None:
        raise ConvertError(f"{where}: sliding_window: attention with a window is not supported in jamba")
    layers = range(content["num_hidden_layers"])
    attends, routes = (
        [i for i in layers if i % content[f"{x}_layer_period"] == content[f"{x}_layer_offset"]]
        for x in ("attn", "expert")
    )
    kinds = tuple("attention" if i in attends else "mamba" for i in layers)
    experts = {"n": content["num_experts"], "per_token": content["num_experts_per_tok"], "layers": routes}
    rank = None if content["mamba_dt_rank"] == "auto" else content["mamba_dt_rank"]
    ssm = {
        "kind": "mamba", "d_state": content["mamba_d_state"], "d_conv": content["mamba_d_conv"],
        "expand": _whole(content, "mamba_expand", where), "dt_rank": rank, "dt_bc_norm": True,
        "bias": content["mamba_proj_bias"], "conv_bias": content["mamba_conv_bias"],
    }  # fmt: skip
    return {
        "vocab_size": content["vocab_size"],
        "d_model": content["hidden_size"],
        "layer_types": kinds,
        "d_ff": content["intermediate_size"],
        "n_heads": content["num_attention_heads"],
        "n_kv_heads": content["num_key_value_heads"],
        "head_dim": content.get("head_dim"),
        "n_fading": 0,
        "norm_eps": content["rms_norm_eps"],
        "ssm": ssm if "mamba" in kinds else None,
        "experts": experts if routes and content["num_experts"] > 1 else None,
    }


# --- what a class of transformers assumes where config.json is silent -----------------------------------------------

_QWEN = {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096}
_BACKBONE = {
    "layer_norm_epsilon": 1e-5, "expand": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True,
}  # fmt: skip
_BACKBONE_EMBED = "backbone.embeddings.weight"
_HEADS = {"num_heads": 128, "head_dim": 64, "n_groups": 8, "time_step_limit": (0.0, math.inf)}
_HYBRID_QWEN = {"max_position_embeddings": 32_768, "num_key_value_heads": 32}

FAMILIES: dict[str, Family] = {
    "llama": Family({"max_position_embeddings": 2048}, _transformer, lambda config: HF_TRANSFORMER),
    "mistral": Family(
        {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
        _transformer,
        lambda config: HF_TRANSFORMER,
    ),
    "qwen2": Family(_QWEN, _transformer, lambda config: HF_TRANSFORMER),
    "qwen3": Family({**_QWEN, "head_dim": 128}, _transformer, lambda config: HF_TRANSFORMER),
    "mamba": Family(
        {**_BACKBONE, "state_size": 16, "time_step_rank": "auto", "tie_word_embeddings": True},
        _mamba,
        lambda config: HF_MAMBA,
        _BACKBONE_EMBED,
    ),
    "mamba2": Family({**_BACKBONE, "state_size": 128, **_HEADS}, _mamba2, lambda config: HF_MAMBA2, _BACKBONE_EMBED),
    "jamba": Family(
        {
            "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "num_experts": 16,
            "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 8,
            "attn_layer_offset": 4, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": "auto",
            "mamba_conv_bias": True, "mamba_proj_bias": False,
        },
        _jamba,
        lambda config: HF_JAMBA,
    ),
    "hybrid_llama": Family({"max_position_embeddings": 2048}, hmf.fields, hmf.table, in_transformers=False),
    "hybrid_qwen2": Family(_HYBRID_QWEN, hmf.fields, hmf.table, in_transformers=False),
    "hybrid_qwen3": Family({**_HYBRID_QWEN, "head_dim": 128}, hmf.fields, hmf.table, in_transformers=False),
}  # fmt: skip
