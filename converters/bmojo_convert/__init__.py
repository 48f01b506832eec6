"""Converters from published checkpoints to bmojo-edge's own folder layout.

Knows file formats and tensor names; knows nothing of generation, the command line or servers.
"""
