"""What every reader of a foreign format hands to the conversion: the model as it was, its parameters, its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bmojo_edge.config import Config


class Source(NamedTuple):
    """A model to convert.

    config describes it as it was (full attention stays `attention` layers) and names the dtype it was stored in;
    weights are its parameters under our names, made one at a time; files are tokenizer files by name, a path to copy or
    a text; generation is the content of generation_config.json. `logits` computes golden logits (n, v) of tokens (n,)
    with the format's own library, None where that is not at hand.
    """

    path: Path
    config: Config
    weights: Mapping[str, np.ndarray]
    files: Mapping[str, Path | str]
    generation: Mapping[str, Any]
    logits: Callable[[np.ndarray], np.ndarray] | None = None
    author: str = ""
