"""Triton kernels of the B'MOJO memories for PyTorch, forward and backward, each with a plain-torch reference op.

Knows nothing of models, checkpoints or the rest of bmojo-edge; imports PyTorch and Triton and nothing of ours.
"""
