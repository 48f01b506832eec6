"""Metal kernels of the B'MOJO memories for MLX, each a body file, a launcher and a plain-MLX reference op.

Knows nothing of models, checkpoints or the rest of bmojo-edge; imports MLX and nothing of ours.
"""
