"""GGUF files of the architectures llama (Mistral's are these too), qwen2 and qwen3, of any quantisation.

The `gguf` package parses and dequantises. Metadata that is not understood is refused by name, for it may change what
the model computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize

from bmojo_convert import gguf_tokenizer
from bmojo_convert.names import GGUF_LLAMA, GGUF_TRANSFORMER, ConvertError, Renamed, Stored
from bmojo_convert.rope import as_decimal, from_gguf
from bmojo_convert.source import Source
from bmojo_edge.config import Config, ConfigError

TABLES = {"llama": GGUF_LLAMA, "qwen2": GGUF_TRANSFORMER, "qwen3": GGUF_TRANSFORMER}
_FREQUENCIES = "rope_freqs.weight"

# Keys under the architecture's name that are read, and those that say nothing a converter needs.
_READ = {
    "embedding_length", "block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
_SILENT = {"context_length", "vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
_NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "use_parallel_residual": False}


class _Files(NamedTuple):
    """The metadata of a model and its tensors, each with the file it lies in."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[Path, ReaderTensor]]


def open_file(path: Path) -> Source:
    """A GGUF file, or the first of a split model, ready to convert.

    Raises ConvertError naming the key or tensor that is wrong or not supported.
    """
    files = _read(path)
    architecture = files.metadata.get("general.architecture")
    if architecture not in TABLES:
        known = ", ".join(TABLES)
        raise ConvertError(f"{path}: general.architecture {architecture!r} is not supported; known are {known}")
    shapes = {name: _shape(tensor) for name, (_, tensor) in files.tensors.items()}
    factors = _load(*files.tensors[_FREQUENCIES]) if _FREQUENCIES in files.tensors else None
    prefix = f"{architecture}."
    keys = {key.removeprefix(prefix): value for key, value in files.metadata.items() if key.startswith(prefix)}
    config = _config(keys, architecture, shapes, factors, str(path))
    stored = Stored(shapes, lambda name: _load(*files.tensors[name]))
    tokenizer, generation = gguf_tokenizer.build(files.metadata, keys.get("context_length"), str(path))
    return Source(
        path=path,
        config=config,
        weights=Renamed(config, TABLES[architecture], stored, str(path)),
        files=tokenizer,
        generation=generation,
    )


# --- files ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> _Files:
    files = _Files({}, {})
    for part in _parts(path):
        try:
            reader = GGUFReader(part)
        except Exception as error:  # the reader meets damage with whatever NumPy raises there
            raise ConvertError(f"{part}: truncated or damaged, or no GGUF file ({error})") from error
        if reader.byte_order != "I":
            raise ConvertError(f"{part}: is written for machines of the other byte order, which is not supported")
        size = part.stat().st_size
        for tensor in reader.tensors:
            if tensor.data_offset + tensor.n_bytes > size:
                raise ConvertError(f"{part}: truncated: tensor {tensor.name!r} reaches beyond the end of the file")
            if tensor.name in files.tensors:
                raise ConvertError(f"{part}: tensor {tensor.name!r} is also in {files.tensors[tensor.name][0].name}")
            files.tensors[tensor.name] = (part, tensor)
        for name, field in reader.fields.items():
            files.metadata.setdefault(name, field.contents())
    return files


def _parts(path: Path) -> list[Path]:
    """All files of a model split as NAME-00001-of-00003.gguf, or the one file."""
    match = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    parts = [path.with_name(f"{match[1]}{n:05d}-of-{match[3]}.gguf") for n in range(1, int(match[3]) + 1)]
    for part in parts:
        if not part.is_file():
            raise ConvertError(f"{part}: file is missing, the model is split into {len(parts)}")
    return parts


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _load(path: Path, tensor: ReaderTensor) -> np.ndarray:
    """One tensor in float32, read by itself so that the file's pages do not stay in memory."""
    kind = GGMLQuantizationType(tensor.tensor_type)
    raw = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.data_offset)
    try:
        rows = raw.reshape(*_shape(tensor)[:-1], -1)
        if kind == GGMLQuantizationType.F64:
            return rows.view(np.float64)
        return dequantize(rows, kind).reshape(_shape(tensor))
    except (NotImplementedError, ValueError) as error:
        raise ConvertError(f"{path}: tensor {tensor.name!r}: {kind.name} cannot be dequantised ({error})") from None


# --- config ---------------------------------------------------------------------------------------------------------


def _config(
    keys: Mapping[str, Any],
    architecture: str,
    shapes: Mapping[str, tuple[int, ...]],
    factors: np.ndarray | None,
    where: str,
) -> Config:
    for key in keys:
        if key not in _READ | _SILENT and _NEUTRAL.get(key) != keys[key]:
            what = f"{architecture}.{key} = {keys[key]!r}"
            raise ConvertError(f"{where}: {what} is not understood and may change the model")

    def integer(key: str, default: int | None = None) -> int:
        value = keys.get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int):
            what = "is missing" if value is None else f"= {value!r}: other values per layer are not supported"
            raise ConvertError(f"{where}: {architecture}.{key} {what}")
        return value

    d, heads = integer("embedding_length"), integer("attention.head_count")
    head_dim = integer("attention.key_length", d // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if integer(key, head_dim) != head_dim:
            raise ConvertError(f"{where}: {architecture}.{key} = {keys[key]} with heads of {head_dim} is not supported")
    if "token_embd.weight" not in shapes:
        raise ConvertError(f"{where}: tensor 'token_embd.weight' is missing")
    theta, scaling = from_gguf(keys, factors, head_dim, where)
    n_layers = integer("block_count")
    try:
        return Config(
            vocab_size=shapes["token_embd.weight"][0],
            d_model=d,
            layer_types=("attention",) * n_layers,
            d_ff=integer("feed_forward_length"),
            n_heads=heads,
            n_kv_heads=integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            attention_window=integer("attention.sliding_window", 0) or None,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=as_decimal(keys.get("attention.layer_norm_rms_epsilon", 1e-6)),
            qk_norm=architecture == "qwen3",
            attention_bias="blk.0.attn_q.bias" in shapes,
            tie_embeddings="output.weight" not in shapes,
        )
    except ConfigError as error:
        raise ConvertError(f"{where}: {error}") from None
