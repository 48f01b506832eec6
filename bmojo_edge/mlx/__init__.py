"""The MLX twin: for Apple silicon, and it runs on Linux. Same files, classes and parameters as `bmojo_edge.torch`."""

from bmojo_edge.mlx.load import load, load_weights
from bmojo_edge.mlx.model import Memory, Model

__all__ = ["Memory", "Model", "load", "load_weights"]
