"""Live models of either twin with given weights, for tests that run on both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bmojo_edge.config import Config

ENGINES = ("mlx", "torch")


def build(engine: str, config: Config, weights: Mapping[str, np.ndarray], tokenizer: Any = None) -> Any:
    """A model of the twin `engine`."""
    if engine == "mlx":
        from bmojo_edge.mlx import Model, load_weights

        model: Any = load_weights(Model(config), weights)
    else:
        from bmojo_edge.torch import Model as TorchModel
        from bmojo_edge.torch import load_weights as load_torch_weights

        model = load_torch_weights(TorchModel(config), weights).eval()
    model.tokenizer = tokenizer
    return model
