"""Work that is done in pieces, so that who does it can do something else in between. It knows nothing of the work."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")

Steps: TypeAlias = Generator[None, None, T]  # yields after each piece, and returns the result


def finished(steps: Steps[T]) -> T:
    """The result, all pieces done one after another."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
