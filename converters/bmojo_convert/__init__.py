"""Converters from published checkpoints to bmojo-edge's own folder layout.

Knows file formats and tensor names; knows nothing of generation, the command line or servers.
"""

from bmojo_convert.conversion import convert, default_dtype
from bmojo_convert.names import ConvertError

__all__ = ["ConvertError", "convert", "default_dtype"]
