"""Rows of tokens for every step, cut from a prepared data set: which ones follows from (seed, step, row) alone.

The documents of an epoch are shuffled and laid end to end, each begun at a multiple of `align`. With `carry` every row
reads on where it ended, so a long document crosses many steps; without, rows are windows drawn in random order.
Nothing here knows models or processes: a process asks for its own rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bmojo_edge.checks import fail
from bmojo_edge.dataset import Dataset

NO_TARGET = -100  # what cross-entropy ignores


class Rows(NamedTuple):
    """n rows of t tokens."""

    tokens: np.ndarray  # (n, t) int64, 0 at padding
    targets: np.ndarray  # (n, t) int64: the next token of the document, NO_TARGET where there is none
    segments: np.ndarray  # (n, t) int64: a change begins a document, -1 = padding
    restarts: np.ndarray  # (n,) bool: the row does not go on where it ended

    @property
    def plain(self) -> bool:
        """Whether every row is a part of one document, without padding."""
        return not self.segments.any()


class _Epoch(NamedTuple):
    """Documents in the order of an epoch, and where each begins in their stream."""

    order: np.ndarray  # (documents,)
    begins: np.ndarray  # (documents + 1,), the last is the stream's length
    windows: np.ndarray  # (rows of the epoch,) the window of each row that starts fresh; () where rows carry


class Stream:
    """All rows of training, or of a validation set with `seed` None: in order, every row fresh."""

    def __init__(
        self, data: Dataset, length: int, rows: int, align: int = 1, carry: bool = True, seed: int | None = 0
    ) -> None:
        self.data, self.length, self.n_rows, self.align = data, length, rows, align
        self.carry, self.seed = carry and seed is not None, seed
        sizes = np.diff(data.offsets)
        self._padded = -(-sizes // align) * align
        windows = int(self._padded.sum()) // length
        if windows < rows:
            fail("batch.tokens", f"a step takes {rows} rows of {length} tokens, {data.folder} has {windows}")
        self.steps_per_epoch = windows // rows
        self._cache: dict[int, _Epoch] = {}

    def _rng(self, epoch: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed or 0, epoch, purpose])

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._cache:
            n = self.data.n_documents
            order = np.arange(n) if self.seed is None else self._rng(epoch, 0).permutation(n)
            begins = np.concatenate([[0], np.cumsum(self._padded[order])])
            windows = np.arange(0 if self.carry else self.steps_per_epoch * self.n_rows)
            windows = windows if self.seed is None else self._rng(epoch, 1).permutation(windows)
            self._cache = {epoch: _Epoch(order, begins, windows)}  # two epochs are never in use at a time
        return self._cache[epoch]

    def _window(self, epoch: int, begin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, targets and segments (t,) of the stream from `begin`."""
        order, begins, _ = self._epoch(epoch)
        t, end = self.length, begin + self.length
        tokens, targets = np.zeros(t, np.int64), np.full(t, NO_TARGET, np.int64)
        segments = np.full(t, -1, np.int64)
        first = int(np.searchsorted(begins, begin, side="right")) - 1
        last = int(np.searchsorted(begins, end, side="left"))
        for segment, n in enumerate(range(first, min(last, len(order)))):
            document, start = self.data.document(int(order[n])), int(begins[n])
            low, high = max(begin, start), min(end, start + len(document))
            if low < high:
                here = slice(low - begin, high - begin)
                tokens[here], segments[here] = document[low - start : high - start], segment
                following = document[low - start + 1 : high - start + 1]
                targets[low - begin : low - begin + len(following)] = following
        return tokens, targets, segments

    def rows(self, step: int, first: int, count: int) -> Rows:
        """Rows first .. first + count - 1 of a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        chosen = np.arange(first, first + count)
        if self.carry:
            places = chosen * self.steps_per_epoch + within
        else:
            places = self._epoch(epoch).windows[within * self.n_rows + chosen]
        windows = [self._window(epoch, int(place) * self.length) for place in places]
        begins = self._epoch(epoch).begins
        fresh = not self.carry or within == 0
        restarts = np.array(
            [fresh or begins[np.searchsorted(begins, p * self.length)] == p * self.length for p in places]
        )
        tokens, targets, segments = (np.stack(parts) for parts in zip(*windows, strict=True))
        return Rows(tokens, targets, segments, restarts)
