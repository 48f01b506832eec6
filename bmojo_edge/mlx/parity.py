"""The MLX twin as an engine of parity records: `forward`, with the outputs of its layers."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from bmojo_edge.doctor import kernels_run
from bmojo_edge.mlx.block import Block, BlockResult
from bmojo_edge.mlx.load import load
from bmojo_edge.parity import Pass
from bmojo_edge.state import State


class _Tapped:
    """A layer that keeps its output."""

    def __init__(self, block: Block, outputs: list[mx.array]) -> None:
        self._block, self._outputs = block, outputs

    def __call__(self, *args: Any) -> BlockResult:
        result = self._block(*args)
        self._outputs.append(result.out)
        return result


class Observed:
    """The model of a folder, looked into; it runs where MLX does."""

    def __init__(self, folder: Path) -> None:
        self.model = load(folder)
        self.config = self.model.config
        metal = mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)
        self.description = {
            "engine": "mlx",
            "version": version("mlx"),
            "device": str(mx.device_info()["device_name"]) if metal else "CPU",
            "kernels": "Metal (bmojo_metal)" if kernels_run() else "no, plain MLX",
        }

    def run(self, tokens: np.ndarray, state: State | None, eidetic_index: np.ndarray | None) -> Pass:
        """Tokens (1, t) after `state`, with the sets given."""
        outputs: list[mx.array] = []
        layers = self.model.layers
        self.model.layers = cast("list[Block]", [_Tapped(layer, outputs) for layer in layers])
        try:
            logits, state, memory = self.model.forward_with_memory(tokens, state, eidetic_index=eidetic_index)
        finally:
            self.model.layers = layers
        mx.eval(logits, state, memory, outputs)
        return Pass(logits, state, memory, outputs)

    def decode(self, token: int, state: State) -> tuple[Any, State]:
        """One token after `state`."""
        logits, state = self.model.decode_one_token([token], state)
        mx.eval(logits, state)
        return logits, state
