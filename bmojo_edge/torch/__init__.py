"""The PyTorch twin: trains, and runs wherever PyTorch does. Same files, classes and parameters as `bmojo_edge.mlx`."""

from bmojo_edge.torch.load import load, load_weights
from bmojo_edge.torch.loss import linear_cross_entropy
from bmojo_edge.torch.model import Memory, Model

__all__ = ["Memory", "Model", "linear_cross_entropy", "load", "load_weights"]
