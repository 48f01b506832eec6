"""The PyTorch twin: trains, and runs wherever PyTorch does. Same files, classes and parameters as `bmojo_edge.mlx`."""

from importlib import import_module
from typing import TYPE_CHECKING

from bmojo_edge.torch.load import load, load_weights
from bmojo_edge.torch.loss import linear_cross_entropy
from bmojo_edge.torch.model import Memory, Model

if TYPE_CHECKING:
    from bmojo_edge.torch.parallel import World
    from bmojo_edge.torch.train import Trainer

__all__ = ["Memory", "Model", "Trainer", "World", "linear_cross_entropy", "load", "load_weights"]

_LATE = {"Trainer": "train", "World": "parallel"}  # who only runs a model needs no torch.distributed


def __getattr__(name: str) -> object:
    """Import what training needs when it is first asked for."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
