"""The PyTorch twin as an engine of parity records: `forward`, with the outputs of its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bmojo_edge.parity import ParityError, Pass
from bmojo_edge.state import State
from bmojo_edge.torch.load import load
from bmojo_edge.torch.ops import on_gpu


class Observed:
    """The model of a folder on a device, looked into."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ParityError("--device cuda: PyTorch finds no CUDA device here")
        self.model = load(folder, device=device)
        self.config = self.model.config
        cuda = self.model.device.type == "cuda"
        self.description = {
            "engine": "torch",
            "version": torch.__version__,
            "device": torch.cuda.get_device_name(self.model.device) if cuda else self.model.device.type.upper(),
            "kernels": "Triton (bmojo_cuda)" if on_gpu(self.model.embed.weight) else "no, plain PyTorch",
        }

    @torch.no_grad()
    def run(self, tokens: np.ndarray, state: State | None, eidetic_index: np.ndarray | None) -> Pass:
        """Tokens (1, t) after `state`, with the sets given."""
        outputs: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda module, args, result: outputs.append(result.out))
            for block in self.model.blocks()
        ]
        state = self.model.init_state() if state is None else state
        try:
            logits, state, memory = self.model.forward_with_memory(tokens, state, eidetic_index=eidetic_index)
        finally:
            for hook in hooks:
                hook.remove()
        return Pass(logits, state, memory, outputs)

    def decode(self, token: int, state: State) -> tuple[Any, State]:
        """One token after `state`."""
        return self.model.decode_one_token([token], state)
