"""The mixers of layers: attention, B'MOJO, and state spaces by themselves."""

from bmojo_edge.mlx.mixers.attention import Attention
from bmojo_edge.mlx.mixers.bmojo import BMojo, Remembered
from bmojo_edge.mlx.mixers.gdn import GDN
from bmojo_edge.mlx.mixers.gka import GKA
from bmojo_edge.mlx.mixers.mamba import Mamba
from bmojo_edge.mlx.mixers.mamba2 import Mamba2
from bmojo_edge.mlx.mixers.ssm import SSM_MIXERS, ssm_mixer

__all__ = ["GDN", "GKA", "SSM_MIXERS", "Attention", "BMojo", "Mamba", "Mamba2", "Remembered", "ssm_mixer"]
