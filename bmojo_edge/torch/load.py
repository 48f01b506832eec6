"""From a model folder to a model: weights cast and placed one at a time, tokenizer attached, golden logits checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmojo_edge import checkpoint, golden, hub, tokenizer
from bmojo_edge.checkpoint import CheckpointError
from bmojo_edge.quantize import dequantized
from bmojo_edge.torch.model import Model


def as_tensor(array: Any) -> Tensor:
    """A tensor of a NumPy array, bfloat16 as `ml_dtypes` has it included; tensors pass through."""
    if isinstance(array, Tensor):
        return array
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":  # PyTorch does not know NumPy's
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def load_weights(model: Model, weights: Mapping[str, Any], device: torch.device | str | None = None) -> Model:
    """Give a model all its parameters, each cast to the dtype the model has it in; returns the model.

    weights maps the names of docs/checkpoints.md to arrays and is read one by one; device None: where the model is.
    Raises CheckpointError naming a parameter that is missing, left over or of another shape.
    """
    parameters, device = dict(model.named_parameters()), model.device if device is None else device
    for name in weights:
        if name not in parameters:
            raise CheckpointError(f"{name}: is not a parameter of this model")
    found = {}
    for name, parameter in parameters.items():
        if name not in weights:
            raise CheckpointError(f"{name}: is missing")
        value = as_tensor(weights[name])
        if value.shape != parameter.shape:
            raise CheckpointError(f"{name}: has shape {tuple(value.shape)}, the model has {tuple(parameter.shape)}")
        found[name] = value.to(device, parameter.dtype)
    model.load_state_dict(found, assign=True)
    return model


def check_device(name: torch.device | str) -> None:
    """Raise ValueError where PyTorch cannot compute on a device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {name}: PyTorch cannot use it here ({reason})") from None


def load(
    path: str | Path,
    dtype: str | None = None,
    verify: bool = False,
    device: torch.device | str = "cpu",
    num_iter: int | None = None,
) -> Model:
    """A model from its folder, or from the hub by owner/name, in evaluation mode, with its tokenizer where it has one.

    dtype: "float32", "float16" or "bfloat16", None as stored; quantised weights are dequantised; verify: compare with
    the folder's golden logits; num_iter: steps of the solver of gka mixers, None as stored (fewer are faster and less
    exact). Raises CheckpointError naming file and field, ValueError for a device that is not there.
    """
    check_device(device)
    folder = hub.locate(path)
    config, weights = checkpoint.read(folder)
    plain = dequantized(weights, config.quantization)
    config = config.replace(quantization=None, **({} if dtype is None else {"dtype": dtype}))
    config = config if num_iter is None else config.with_num_iter(num_iter)
    with torch.device("meta"):  # no memory and no time for values that are replaced
        model = Model(config)
    load_weights(model, plain, device).eval()
    if any((folder / name).is_file() for name in tokenizer.FILES):
        model.tokenizer = tokenizer.Tokenizer.load(folder)
    if verify:
        with torch.no_grad():
            golden.check(folder, config, lambda tokens: model(tokens)[0].float().cpu().numpy())
    return model
