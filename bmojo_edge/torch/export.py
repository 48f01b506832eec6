"""From trained parameters to a model folder of ours, with golden logits, checked before it gets its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bmojo_edge import checkpoint, golden
from bmojo_edge.config import Config
from bmojo_edge.torch.load import load
from bmojo_edge.torch.model import Model


def whole_parameters(model: Model) -> dict[str, np.ndarray]:
    """Every parameter in float32 on the CPU; all processes that share a model call this together."""

    def whole(parameter: Tensor) -> np.ndarray:
        tensor = parameter.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return tensor.float().cpu().numpy()

    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def export(folder: Path, config: Config, weights: dict[str, np.ndarray], tokenizer: Path) -> None:
    """Write a model folder in `config.dtype`, with the tokenizer files of another folder.

    The oracle's logits of the float32 weights go with it, and the PyTorch twin's of what was written are compared with
    them before the folder appears. Raises CheckpointError where they differ.
    """
    tokens = golden.tokens_for(config.vocab_size)
    author = "bmojo_edge.reference, float32, on the weights as trained"
    made = golden.Golden(tokens, golden.oracle_logits(config, weights, tokens), author)
    with checkpoint.staged_checkpoint(folder) as temporary:
        checkpoint.write_weights(temporary, config, weights)
        checkpoint.copy_tokenizer(tokenizer, temporary)
        golden.write(temporary, made)
        checkpoint.write_config(temporary, config)
        with torch.no_grad():
            load(temporary, verify=True)
