"""Metal kernels of the B'MOJO memories for MLX, each a body file, a launcher and a plain-MLX reference op.

Every op runs its kernel where `kernels_available()`, else its reference, and has the reference's gradient.
Knows nothing of models, checkpoints or the rest of bmojo-edge; imports MLX and nothing of ours.
"""

from bmojo_metal.attention import Band, Pinned, Queries, memory_attention
from bmojo_metal.attention_step import Slots, memory_attention_step
from bmojo_metal.conv import silu_conv
from bmojo_metal.launch import exported, kernels_available, use_kernels
from bmojo_metal.linear import Linear, Unrounded, linear_wide
from bmojo_metal.norm import add_rms_norm
from bmojo_metal.rotation import Rotary, rotate, rotate_token
from bmojo_metal.scan import selective_scan
from bmojo_metal.scan_step import MambaWeights, scan_inputs, selective_scan_step
from bmojo_metal.selection import Eidetic, Ring, innovation_scores, innovation_step, promote, select_eidetic

__all__ = [
    "Band",
    "Eidetic",
    "Linear",
    "MambaWeights",
    "Pinned",
    "Queries",
    "Ring",
    "Rotary",
    "Slots",
    "Unrounded",
    "add_rms_norm",
    "exported",
    "innovation_scores",
    "innovation_step",
    "kernels_available",
    "linear_wide",
    "memory_attention",
    "memory_attention_step",
    "promote",
    "rotate",
    "rotate_token",
    "scan_inputs",
    "select_eidetic",
    "selective_scan",
    "selective_scan_step",
    "silu_conv",
    "use_kernels",
]
