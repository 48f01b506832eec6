"""From a model folder to a model: weights cast and placed one at a time, tokenizer attached, golden logits checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from bmojo_edge import checkpoint, golden, hub, tokenizer
from bmojo_edge.checkpoint import CheckpointError
from bmojo_edge.mlx.model import Model


def as_array(array: Any) -> mx.array:
    """An MLX array of a NumPy array, bfloat16 as `ml_dtypes` has it included; MLX arrays pass through."""
    if isinstance(array, mx.array):
        return array
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def load_weights(model: Model, weights: Mapping[str, Any]) -> Model:
    """Give a model all its parameters, each cast to the dtype the model has it in; returns the model.

    weights maps the names of docs/checkpoints.md to arrays and is read one by one. Layers whose weights come with
    `scales` become quantised ones, as `config.quantization` says.
    Raises CheckpointError naming a parameter that is missing, left over or of another shape.
    """
    rule = model.config.quantization
    if rule is not None:
        nn.quantize(
            model,
            rule.group_size,
            rule.bits,
            mode=rule.mode,
            class_predicate=lambda path, module: hasattr(module, "to_quantized") and f"{path}.scales" in weights,
        )
    parameters = dict(tree_flatten(model.parameters()))
    for name in weights:
        if name not in parameters:
            raise CheckpointError(f"{name}: is not a parameter of this model")
    found = []
    for name, parameter in parameters.items():
        if name not in weights:
            raise CheckpointError(f"{name}: is missing")
        value = as_array(weights[name])
        if value.shape != parameter.shape:
            raise CheckpointError(f"{name}: has shape {value.shape}, the model has {parameter.shape}")
        found.append((name, value.astype(parameter.dtype)))
        mx.eval(found[-1])
    model.update(tree_unflatten(found))
    return model


def load(path: str | Path, dtype: str | None = None, verify: bool = False, num_iter: int | None = None) -> Model:
    """A model from its folder, or from the hub by owner/name, with its tokenizer where it has one.

    dtype: "float32", "float16" or "bfloat16", None as stored; verify: compare with the folder's golden logits;
    num_iter: steps of the solver of gka mixers, None as stored (fewer are faster and less exact).
    Raises CheckpointError naming file and field.
    """
    folder = hub.locate(path)
    config, weights = checkpoint.read(folder)
    config = config if dtype is None else config.replace(dtype=dtype)
    config = config if num_iter is None else config.with_num_iter(num_iter)
    model = load_weights(Model(config), weights)
    if any((folder / name).is_file() for name in tokenizer.FILES):
        model.tokenizer = tokenizer.Tokenizer.load(folder)
    if verify:
        golden.check(folder, config, lambda tokens: model(tokens)[0].astype(mx.float32))
    return model
