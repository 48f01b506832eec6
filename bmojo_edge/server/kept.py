"""States that outlive their request, found again by the token ids they have taken in.

A state is used only where its ids are exactly how a prompt begins, so answers are those of reading the whole prompt.
States that sessions keep are counted among them, so that what was not used for longest goes first whoever has it.
This module knows ids and states; it knows nothing of texts, requests or time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


class Kept(NamedTuple):
    """A state of one row, and the ids it has taken in."""

    ids: Ids  # (n,)
    state: Any


class Held(NamedTuple):
    """States that someone else keeps, and may be told to drop."""

    states: int
    drop: Callable[[], None]


class KeptStates:
    """At most so many states as `shrink` last said; the ones not used for longest go first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[bytes | str, Kept | Held] = OrderedDict()

    def __len__(self) -> int:
        return sum(entry.states if isinstance(entry, Held) else 1 for entry in self._entries.values())

    def put(self, ids: Ids, state: Any) -> None:
        """Keep a state; one of the same ids is replaced. A state that has taken in nothing is not worth keeping."""
        if len(ids):
            self._entries[ids.tobytes()] = Kept(ids, state)
            self._entries.move_to_end(ids.tobytes())

    def hold(self, name: str, count: int, drop: Callable[[], None]) -> None:
        """Count states that are kept elsewhere; `drop` is called when they have to go."""
        self._entries[name] = Held(count, drop)
        self._entries.move_to_end(name)

    def release(self, name: str) -> None:
        """No longer count the states of this name, if any."""
        self._entries.pop(name, None)

    def longest(self, ids: Ids) -> Kept | None:
        """The kept state that has taken in most of the beginning of `ids` (n,), and nothing else."""
        best: Kept | None = None
        for kept in self._entries.values():
            if isinstance(kept, Held):
                continue
            n = len(kept.ids)
            if n <= len(ids) and (best is None or n > len(best.ids)) and np.array_equal(kept.ids, ids[:n]):
                best = kept
        if best is not None:
            self._entries.move_to_end(best.ids.tobytes())
        return best

    def shrink(self, count: int) -> None:
        """Drop the states not used for longest until at most `count` are left."""
        left = len(self)
        while left > max(count, 0):
            _, entry = self._entries.popitem(last=False)
            left -= entry.states if isinstance(entry, Held) else 1
            if isinstance(entry, Held):
                entry.drop()
