"""Triton kernels of the B'MOJO memories for PyTorch, forward and backward, each with a plain-torch reference op.

Knows nothing of models, checkpoints or the rest of bmojo-edge; imports PyTorch and Triton and nothing of ours.
"""

from bmojo_cuda.attention import memory_attention
from bmojo_cuda.attention_reference import memory_attention_reference
from bmojo_cuda.conv import causal_conv, causal_conv_reference
from bmojo_cuda.scan import selective_scan, selective_scan_reference
from bmojo_cuda.selection import innovation, innovation_reference, select_eidetic, select_eidetic_reference

__all__ = [
    "causal_conv",
    "causal_conv_reference",
    "innovation",
    "innovation_reference",
    "memory_attention",
    "memory_attention_reference",
    "select_eidetic",
    "select_eidetic_reference",
    "selective_scan",
    "selective_scan_reference",
]
