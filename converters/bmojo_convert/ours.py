"""Models that are ours already: a folder, quantised or not, or a PyTorch file that holds tensors and plain values.

Converting one is a change of dtype, quantisation or memories, never a renaming.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmojo_convert.names import ConvertError, Renamed, Stored, own_names
from bmojo_convert.source import Source
from bmojo_edge import checkpoint
from bmojo_edge.checkpoint import CONFIG, GENERATION, TOKENIZER_FILES
from bmojo_edge.config import Config, ConfigError
from bmojo_edge.quantize import dequantized
from bmojo_edge.tensors import as_numpy, read_json

_WEIGHTS = ("weights", "model", "state_dict")


def open_folder(folder: Path) -> Source:
    """A model folder of ours; a quantised one comes as plain float32 weights."""
    config, tensors = checkpoint.read(folder)
    plain = config.replace(quantization=None)
    return _source(folder, folder, plain, dequantized(tensors, config.quantization))


def open_file(path: Path) -> Source:
    """A `.pt` file: `{"config": ..., "weights": {name: tensor}}`, or weights alone with config.json beside it.

    config is the content of config.json as a mapping or as text. Tokenizer files are taken from the file's folder.
    Raises ConvertError for a pickle with anything but tensors and plain values in it; nothing in it is run.
    """
    try:
        import torch
    except ImportError:
        raise ConvertError(f"{path}: reading PyTorch files needs torch; pip install 'bmojo-edge[torch]'") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ConvertError(f"{path}: refused: holds more than tensors and plain values ({reason})") from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise ConvertError(f"{path}: truncated or damaged, or no PyTorch file ({error})") from None
    if not isinstance(content, Mapping):
        raise ConvertError(f"{path}: must hold a mapping, holds {type(content).__name__}")
    weights = next((content[key] for key in _WEIGHTS if isinstance(content.get(key), Mapping)), None)
    given: Any = content.get("config")
    if given is None:
        weights = content if weights is None else weights
        given = read_json(path.with_name(CONFIG))
    if weights is None:
        raise ConvertError(f"{path}: has none of {', '.join(_WEIGHTS)}")
    try:
        config = given if isinstance(given, Config) else Config.from_json(given)
    except (ConfigError, TypeError) as error:
        raise ConvertError(f"{path}: config: {error}") from None
    for name, value in weights.items():
        if not hasattr(value, "shape"):
            raise ConvertError(f"{path}: {name!r} is no tensor but {type(value).__name__}")
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    config = config.replace(quantization=None)
    renamed = Renamed(config, own_names(config), Stored(shapes, lambda name: as_numpy(weights[name])), str(path))
    return _source(path, path.parent, config, renamed)


def _source(path: Path, folder: Path, config: Config, weights: Mapping[str, Any]) -> Source:
    return Source(
        path=path,
        config=config,
        weights=weights,
        files={name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()},
        generation=read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {},
    )
