"""Reading fields of a foreign config.json, and refusing by name what is missing or unknown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bmojo_convert.names import ConvertError

Content = Mapping[str, Any]


def require_integers(content: Content, where: str, *names: str) -> None:
    """Raise ConvertError for a field that is missing or no integer."""
    for name in names:
        if not isinstance(content.get(name), int):
            raise ConvertError(f"{where}: {name} is missing or no integer")


def refuse_activation(content: Content, where: str) -> None:
    """Raise ConvertError for an activation other than SiLU."""
    activation = content.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConvertError(f"{where}: hidden_act {activation!r} is not supported; known is silu")
