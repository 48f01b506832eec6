"""States that outlive their request, found again by the token ids they have taken in.

A state is used only where its ids are exactly how a prompt begins, so answers are those of reading the whole prompt.
This module knows ids and states; it knows nothing of texts, requests or time.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


class Kept(NamedTuple):
    """A state of one row, and the ids it has taken in."""

    ids: Ids  # (n,)
    state: Any


class KeptStates:
    """At most so many states as `shrink` last said; the ones not used for longest go first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[bytes, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, ids: Ids, state: Any) -> None:
        """Keep a state; one of the same ids is replaced. A state that has taken in nothing is not worth keeping."""
        if len(ids):
            self._entries[ids.tobytes()] = Kept(ids, state)
            self._entries.move_to_end(ids.tobytes())

    def longest(self, ids: Ids) -> Kept | None:
        """The kept state that has taken in most of the beginning of `ids` (n,), and nothing else."""
        best: Kept | None = None
        for kept in self._entries.values():
            n = len(kept.ids)
            if n <= len(ids) and (best is None or n > len(best.ids)) and np.array_equal(kept.ids, ids[:n]):
                best = kept
        if best is not None:
            self._entries.move_to_end(best.ids.tobytes())
        return best

    def shrink(self, count: int) -> None:
        """Drop the states not used for longest until at most `count` are left."""
        while len(self._entries) > max(count, 0):
            self._entries.popitem(last=False)
