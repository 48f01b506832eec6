"""A model folder in the Hugging Face layout: config, weights, tokenizer files (docs/checkpoints.md).

Reading checks every name and shape against the config and then reads tensors one at a time; writing goes to a
temporary folder that takes the final name at the end. Knows neither engines nor foreign formats.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from bmojo_edge import golden
from bmojo_edge.config import Config, ConfigError
from bmojo_edge.mlx_lm_plugin import MODEL_FILE, SOURCE
from bmojo_edge.parameters import parameter_shapes
from bmojo_edge.quantize import is_quantizable, packed_shapes, quantize
from bmojo_edge.staging import backup_of, staged
from bmojo_edge.tensors import (
    FLOATS,
    INDEX,
    SHARD_BYTES,
    CheckpointError,
    Spec,
    Tensors,
    TensorWriter,
    as_numpy,
    read_json,
    write_text,
)

__all__ = ["CONFIG", "GENERATION", "TOKENIZER_FILES", "CheckpointError", "read", "save", "staged_checkpoint"]

CONFIG = "config.json"
GENERATION = "generation_config.json"
MODEL_CARD = "README.md"  # mlx-lm writes one
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_FLOAT32_ALWAYS = (".A_log", ".D", ".dt_proj.bias", ".dt_bias")  # the scan is float32 whatever the model's dtype

Progress = Callable[[str, int, int], None]


def read(folder: str | Path) -> tuple[Config, Tensors]:
    """The config and the weights of a model folder; weights are read one at a time, when asked for.

    Weights map each name of docs/checkpoints.md to an array as stored: bfloat16 as `ml_dtypes.bfloat16`; a quantised
    weight as uint32 words with `scales` and `biases` beside it (`quantize.dequantized` gives plain ones).
    Raises CheckpointError naming the file and the field or tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        backup = backup_of(folder)
        hint = f"; a replacement was cut off, the former one is {backup}" if backup else ""
        raise CheckpointError(f"{folder}: no such folder{hint}")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder / CONFIG}: file is missing, so this is no model folder")
    content = read_json(folder / CONFIG)
    if "model_type" not in content:
        raise CheckpointError(f"{folder / CONFIG}: model_type is missing")
    try:
        config = Config.from_json(content)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    weights = Tensors.open(folder)
    validate(config, weights, folder)
    return config, weights


def validate(config: Config, weights: Tensors, folder: Path) -> None:
    """Check that stored tensors are exactly the parameters of a config, some of them perhaps quantised."""
    expected: set[str] = set()
    for name, shape in parameter_shapes(config).items():
        owner = name.removesuffix(".weight")
        parts = {name: shape}
        if config.quantization is not None and name.endswith(".weight") and f"{owner}.scales" in weights:
            packed, groups = packed_shapes(shape, config.quantization)
            parts = {name: packed, f"{owner}.scales": groups, f"{owner}.biases": groups}
        for part, part_shape in parts.items():
            if part not in weights:
                raise CheckpointError(f"{folder}: tensor {part!r} is missing")
            info, words = weights.info(part), len(parts) > 1 and part == name
            if info.shape != part_shape:
                raise CheckpointError(f"{info.path}: tensor {part!r} has shape {info.shape}, expected {part_shape}")
            if (info.dtype != "uint32") if words else (info.dtype not in FLOATS):
                wanted = "uint32 words" if words else "a floating-point dtype"
                raise CheckpointError(f"{info.path}: tensor {part!r} is {info.dtype}, expected {wanted}")
        expected |= parts.keys()
    extra = sorted(set(weights) - expected)
    if extra:
        path = weights.info(extra[0]).path
        raise CheckpointError(f"{path}: {len(extra)} tensor(s) the config has no place for, such as {extra[0]!r}")


def save(
    folder: str | Path,
    config: Config,
    weights: Mapping[str, Any],
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder; one that exists is replaced at the end, and only if it holds a model of ours.

    weights maps names to NumPy, PyTorch or MLX arrays; they are cast to `config.dtype` and, with
    `config.quantization`, quantised (those given as packed words stay as they are). tokenizer: a folder or file whose
    tokenizer files are copied, or an object with `save(folder)` or `save_pretrained(folder)`.
    Raises CheckpointError naming the tensor, before anything is written.
    """
    with staged_checkpoint(Path(folder)) as temporary:
        write_weights(temporary, config, weights, shard_bytes)
        if tokenizer is not None:
            _save_tokenizer(temporary, tokenizer)
        write_config(temporary, config)


def staged_checkpoint(target: Path, overwrite: bool = True) -> AbstractContextManager[Path]:
    """`staging.staged` for model folders: an existing one is replaced where `overwrite`, anything else is refused."""

    return staged(target, lambda folder: check_replaceable(folder, overwrite))


def check_replaceable(folder: Path, overwrite: bool = True) -> None:
    """Raise CheckpointError unless an existing path is an empty folder, or a model of ours and `overwrite`."""
    entries = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None
    if entries == []:
        return
    if not overwrite:
        raise CheckpointError(f"{folder}: exists; choose another name or ask for it to be overwritten")
    if entries is None or CONFIG not in entries or read_json(folder / CONFIG).get("model_type") != "bmojo":
        raise CheckpointError(f"{folder}: exists and is not a model folder of ours, so it is not replaced")
    for name in entries:
        if not _is_part(name):
            raise CheckpointError(f"{folder / name}: is no part of a model and would be lost; move it elsewhere")


def _is_part(name: str) -> bool:
    known = (CONFIG, GENERATION, INDEX, golden.FILE, MODEL_FILE, MODEL_CARD, *TOKENIZER_FILES)
    return name in known or (name.startswith("model") and name.endswith(".safetensors"))


def write_config(folder: Path, config: Config) -> None:
    """Write the model file that mlx-lm runs and, last of all, config.json: without it a folder is no model."""
    shutil.copyfile(SOURCE, folder / MODEL_FILE)
    content = {**config.to_dict(), "model_file": MODEL_FILE}
    if config.quantization is None:
        del content["quantization"]  # where the key is, mlx-lm takes the model for a quantised one
    else:  # mlx-lm writes both keys
        content["quantization_config"] = content["quantization"]
    write_text(folder / CONFIG, json.dumps(content, indent=2) + "\n")


def _dtype_of(name: str, config: Config) -> str:
    return "float32" if name.endswith(_FLOAT32_ALWAYS) else config.dtype


def _specs(config: Config, weights: Mapping[str, Any]) -> dict[str, Spec]:
    """What will be stored: every parameter in its dtype, or its three tensors where it is quantised."""
    specs, q = {}, config.quantization
    for name, shape in parameter_shapes(config).items():
        owner, dtype = name.removesuffix(".weight"), _dtype_of(name, config)
        if q is not None and (is_quantizable(name, shape, q) or f"{owner}.scales" in weights):
            packed, groups = packed_shapes(shape, q)
            specs[name] = Spec("uint32", packed)
            specs |= {f"{owner}.{leaf}": Spec(dtype, groups) for leaf in ("scales", "biases")}
        else:
            specs[name] = Spec(dtype, shape)
    return specs


def _check_given(config: Config, weights: Mapping[str, Any], specs: Mapping[str, Spec]) -> None:
    """Names, and shapes where they are known without reading, before anything is written."""
    shapes = parameter_shapes(config)
    for name, shape in shapes.items():
        if name not in weights:
            raise CheckpointError(f"tensor {name!r} is missing from the weights given")
        if not isinstance(weights, Tensors | dict):  # a lazy mapping: shapes are seen as tensors come
            continue
        given = tuple(weights.info(name).shape if isinstance(weights, Tensors) else weights[name].shape)
        if given not in (shape, specs[name].shape):
            raise CheckpointError(f"tensor {name!r} has shape {given}, expected {shape}")
    extra = sorted(set(weights) - set(specs))
    if extra:
        raise CheckpointError(f"{len(extra)} tensor(s) the config has no place for, such as {extra[0]!r}")


def _cast(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # looked for below
        cast = array.astype(dtype, copy=False)
    if cast is not array and dtype == "float16" and not np.isfinite(cast).all() and np.isfinite(array).all():
        largest = float(np.abs(array).max())
        raise CheckpointError(
            f"tensor {name!r}: values up to {largest:.3g} do not fit float16; use bfloat16 or float32"
        )
    return cast


def write_weights(
    folder: Path,
    config: Config,
    weights: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write all parameters, cast and quantised as the config says, holding one of them in memory at a time.

    progress is called with ("weights", parameters done, parameters in all).
    """
    specs = _specs(config, weights)
    _check_given(config, weights, specs)
    shapes = parameter_shapes(config)
    done, total = 0, sum(int(np.prod(shape)) for shape in shapes.values())
    writer = TensorWriter(folder, specs, shard_bytes)
    try:
        for name, shape in shapes.items():
            array, owner, dtype = as_numpy(weights[name]), name.removesuffix(".weight"), _dtype_of(name, config)
            if specs[name].dtype != "uint32":
                stored = {name: _cast(name, array, dtype)}
            elif array.dtype == np.uint32:
                companions = {f"{owner}.{leaf}" for leaf in ("scales", "biases")}
                stored = {name: array} | {part: _cast(part, as_numpy(weights[part]), dtype) for part in companions}
            else:
                assert config.quantization is not None
                packed, scales, biases = quantize(_cast(name, array, dtype), config.quantization)
                stored = {name: packed, f"{owner}.scales": scales, f"{owner}.biases": biases}
            for part, value in stored.items():
                if value.shape != specs[part].shape:
                    raise CheckpointError(f"tensor {part!r} has shape {value.shape}, expected {specs[part].shape}")
                writer.write(part, value)
            done += int(np.prod(shape))
            if progress is not None:
                progress("weights", done, total)
        writer.close()
    finally:
        writer.abandon()


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of a folder, or one file, and generation_config.json where there is one."""
    names = (*TOKENIZER_FILES, GENERATION)
    for path in [source] if source.is_file() else [source / name for name in names]:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _save_tokenizer(folder: Path, tokenizer: Any) -> None:
    if isinstance(tokenizer, str | os.PathLike):
        source = Path(tokenizer)
        if not source.exists():
            raise CheckpointError(f"{source}: no such tokenizer file or folder")
        copy_tokenizer(source, folder)
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    elif hasattr(tokenizer, "save"):
        tokenizer.save(folder)
    else:
        raise CheckpointError(f"tokenizer: must be a path or have a method to save itself, got {tokenizer!r}")
