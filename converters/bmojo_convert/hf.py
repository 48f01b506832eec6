"""Llama-family folders of Hugging Face Transformers: llama, mistral, qwen2, qwen3, plain or quantised by mlx-lm.

Missing fields have the defaults of the model's class in transformers; what we cannot compute is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from bmojo_convert.names import HF_TRANSFORMER, ConvertError, Renamed, Stored
from bmojo_convert.rope import from_huggingface
from bmojo_convert.source import Source
from bmojo_edge.checkpoint import CONFIG, GENERATION, TOKENIZER_FILES
from bmojo_edge.config import DTYPES, Config, ConfigError, Quantization
from bmojo_edge.parameters import parameter_count
from bmojo_edge.quantize import dequantized
from bmojo_edge.tensors import Tensors, read_json

# What a class of transformers assumes where config.json is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128,
    },
}  # fmt: skip

# Above this, a copy of the whole model in float32 is too much to ask for; the oracle needs one layer.
_LARGEST_WHOLE = 1 << 30

_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def open_folder(folder: Path) -> Source:
    """A folder with config.json and safetensors weights, ready to convert.

    Raises ConvertError naming the field or tensor that is wrong or not supported.
    """
    where = str(folder / CONFIG)
    given = read_json(folder / CONFIG)
    kind = given.get("model_type")
    if kind not in _DEFAULTS:
        raise ConvertError(f"{where}: model_type {kind!r} is not supported; known are {', '.join(_DEFAULTS)}, bmojo")
    content = {**_DEFAULTS[kind], **given}
    quantization = _quantization(content, where)
    tensors = Tensors.open(folder)
    stored = _stored(tensors, quantization)
    tied = bool(content.get("tie_word_embeddings")) and not _has_own_head(stored)
    if tied:
        stored = _without_head(stored)
    config = _config(content, tied, _dtype(tensors), where)
    whole = quantization is None and parameter_count(config) * 4 <= _LARGEST_WHOLE and _has_transformers()
    return Source(
        path=folder,
        config=config,
        weights=Renamed(config, HF_TRANSFORMER, stored, str(folder)),
        files={name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()},
        generation=_generation(folder, content),
        logits=(lambda tokens: _transformers_logits(folder, tokens)) if whole else None,
        author=f"transformers {version('transformers')}" if whole else "",
    )


# --- tensors --------------------------------------------------------------------------------------------------------


def _quantization(content: Mapping[str, Any], where: str) -> Quantization | None:
    """How mlx-lm has quantised a folder, None where it is plain; other methods are refused by name."""
    given = content.get("quantization") or content.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, Mapping) or "group_size" not in given or "quant_method" in given:
        method = given.get("quant_method", "unknown") if isinstance(given, Mapping) else given
        raise ConvertError(f"{where}: quantization_config: {method!r} is not supported; take the unquantised model")
    try:
        return Quantization(**given)
    except TypeError:
        raise ConvertError(f"{where}: quantization: settings of single layers are not supported") from None
    except ConfigError as error:
        raise ConvertError(f"{where}: {error}") from None


def _stored(tensors: Tensors, quantization: Quantization | None) -> Stored:
    """Tensors with the shapes and values of the weights they are, quantised or not."""
    plain = dequantized(tensors, quantization)
    shapes = {}
    for name in plain:
        shape = tensors.shape(name)
        if quantization is not None and f"{name.removesuffix('.weight')}.scales" in tensors:
            shape = (*shape[:-1], shape[-1] * 32 // quantization.bits)
        shapes[name] = shape
    return Stored(shapes, plain.__getitem__)


def _dtype(tensors: Tensors) -> str:
    """The dtype of the embedding, or of its scales, stands for the model's."""
    for name in (_EMBED, _HEAD):
        for part in (name.replace(".weight", ".scales"), name):
            if part in tensors and tensors.info(part).dtype in DTYPES:
                return tensors.info(part).dtype
    return "float32"


def _has_own_head(stored: Stored) -> bool:
    """Whether a model that says it is tied has a head of its own after all; transformers then does not tie."""
    if _HEAD not in stored.shapes or _EMBED not in stored.shapes:
        return False
    return not np.array_equal(stored.read(_HEAD), stored.read(_EMBED))


def _without_head(stored: Stored) -> Stored:
    """The tensors of a tied model, of which some checkpoints keep both names and some only the head's."""
    shapes = dict(stored.shapes)
    head = shapes.pop(_HEAD, None)
    if head is None or _EMBED in shapes:
        return Stored(shapes, stored.read)
    return Stored({**shapes, _EMBED: head}, lambda name: stored.read(_HEAD if name == _EMBED else name))


# --- config ---------------------------------------------------------------------------------------------------------


def _config(content: Mapping[str, Any], tied: bool, dtype: str, where: str) -> Config:
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(content.get(name), int):
            raise ConvertError(f"{where}: {name} is missing or no integer")
    _refuse(content, where)
    n_layers = content["num_hidden_layers"]
    theta, scaling = from_huggingface(content, where)
    try:
        return Config(
            vocab_size=content["vocab_size"],
            d_model=content["hidden_size"],
            layer_types=("attention",) * n_layers,
            d_ff=content["intermediate_size"],
            n_heads=content["num_attention_heads"],
            n_kv_heads=content.get("num_key_value_heads"),
            head_dim=content.get("head_dim"),
            attention_window=_windows(content, n_layers, where),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=content.get("rms_norm_eps", 1e-6),
            qk_norm=content["model_type"] == "qwen3",
            attention_bias=content["model_type"] == "qwen2",
            tie_embeddings=tied,
            dtype=dtype,
        )
    except ConfigError as error:
        raise ConvertError(f"{where}: {error}") from None


def _refuse(content: Mapping[str, Any], where: str) -> None:
    activation = content.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConvertError(f"{where}: hidden_act {activation!r} is not supported; known is silu")
    if content.get("mlp_bias"):
        raise ConvertError(f"{where}: mlp_bias: biases in the MLP are not supported")
    if content.get("attention_bias") and content["model_type"] in ("llama", "qwen3"):
        raise ConvertError(f"{where}: attention_bias: it gives o_proj a bias in {content['model_type']}, not supported")


def _windows(content: Mapping[str, Any], n_layers: int, where: str) -> int | tuple[int | None, ...] | None:
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


def _generation(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json with every end-of-sequence id that it or config.json names."""
    path = folder / GENERATION
    generation = dict(read_json(path)) if path.is_file() else {}
    ends: list[int] = []
    for place in (generation, content):
        given = place.get("eos_token_id")
        ends += [x for x in (given if isinstance(given, list) else [given]) if x is not None and x not in ends]
    for name in ("bos_token_id", "pad_token_id"):
        if generation.get(name) is None and isinstance(content.get(name), int):
            generation[name] = content[name]
    return {**generation, "eos_token_id": ends} if ends else generation


# --- golden logits --------------------------------------------------------------------------------------------------


def _has_transformers() -> bool:
    """Whether transformers can be asked: new enough, and with PyTorch."""
    try:
        version("torch")
        return tuple(int(x) for x in version("transformers").split(".")[:2]) >= (4, 56)
    except (PackageNotFoundError, ValueError):
        return False


def _transformers_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits (n, v) of tokens (n,) by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        with torch.inference_mode():
            return model.eval()(torch.from_numpy(tokens[None]), use_cache=False).logits[0].numpy()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ConvertError(f"{folder}: transformers cannot compute the golden logits ({error})") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
