"""Folders in the layout of Hugging Face Transformers, plain or quantised by mlx-lm: files, tensors, golden logits.

What the fields of config.json mean and how tensors are named is the family's (`families.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from bmojo_convert.families import FAMILIES
from bmojo_convert.names import ConvertError, Renamed, Stored
from bmojo_convert.source import Source
from bmojo_edge.checkpoint import CONFIG, GENERATION, TOKENIZER_FILES
from bmojo_edge.config import DTYPES, Config, ConfigError, Quantization
from bmojo_edge.parameters import parameter_count
from bmojo_edge.quantize import dequantized
from bmojo_edge.tensors import Tensors, read_json

# Above this, a copy of the whole model in float32 is too much to ask for; the oracle needs one layer.
_LARGEST_WHOLE = 1 << 30

_HEAD = "lm_head.weight"  # in every family


def open_folder(folder: Path) -> Source:
    """A folder with config.json and safetensors weights, ready to convert.

    Raises ConvertError naming the field or tensor that is wrong or not supported.
    """
    where = str(folder / CONFIG)
    given = read_json(folder / CONFIG)
    kind = given.get("model_type")
    if kind not in FAMILIES:
        raise ConvertError(f"{where}: model_type {kind!r} is not supported; known are {', '.join(FAMILIES)}, bmojo")
    family = FAMILIES[kind]
    content = {**family.defaults, **given}
    quantization = _quantization(content, where)
    tensors = Tensors.open(folder)
    stored = _stored(tensors, quantization)
    tied = bool(content.get("tie_word_embeddings")) and not _has_own_head(stored, family.embed)
    if tied:
        stored = _without_head(stored, family.embed)
    try:
        dtype = _dtype(tensors, family.embed)
        config = Config(**family.fields(content, where), tie_embeddings=tied, dtype=dtype)
    except ConfigError as error:
        raise ConvertError(f"{where}: {error}") from None
    small = parameter_count(config) * 4 <= _LARGEST_WHOLE
    whole = quantization is None and small and family.in_transformers and _has_transformers()
    return Source(
        path=folder,
        config=config,
        weights=Renamed(config, family.table(config), stored, str(folder)),
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


def _dtype(tensors: Tensors, embed: str) -> str:
    """The dtype of the embedding, or of its scales, stands for the model's."""
    for name in (embed, _HEAD):
        for part in (name.replace(".weight", ".scales"), name):
            if part in tensors and tensors.info(part).dtype in DTYPES:
                return tensors.info(part).dtype
    return "float32"


def _has_own_head(stored: Stored, embed: str) -> bool:
    """Whether a model that says it is tied has a head of its own after all; transformers then does not tie."""
    if _HEAD not in stored.shapes or embed not in stored.shapes:
        return False
    return not np.array_equal(stored.read(_HEAD), stored.read(embed))


def _without_head(stored: Stored, embed: str) -> Stored:
    """The tensors of a tied model, of which some checkpoints keep both names and some only the head's."""
    shapes = dict(stored.shapes)
    head = shapes.pop(_HEAD, None)
    if head is None or embed in shapes:
        return Stored(shapes, stored.read)
    return Stored({**shapes, embed: head}, lambda name: stored.read(_HEAD if name == embed else name))


# --- files ----------------------------------------------------------------------------------------------------------


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
