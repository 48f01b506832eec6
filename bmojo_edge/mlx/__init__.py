"""The MLX twin: runs on Apple silicon and, slowly, on Linux. Same files, classes and parameters as `bmojo_edge.torch`."""

from bmojo_edge.mlx.load import load, load_weights
from bmojo_edge.mlx.model import Memory, Model

__all__ = ["Memory", "Model", "load", "load_weights"]
