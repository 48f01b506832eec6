"""Whether a loss runs away: how far its recent mean is above the lowest it has been. No engine is imported."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

STEPS = 20  # whose losses are averaged


class Divergence:
    """Losses as they come, in nats; those of steps before a resumption are given first."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._recent: deque[float] = deque(maxlen=STEPS)
        self._lowest = float("inf")
        for loss in losses:
            self.rise(loss)

    def rise(self, loss: float) -> float:
        """Nats that the mean of the last STEPS losses is above its lowest so far, 0 where there are fewer."""
        self._recent.append(loss)
        if len(self._recent) < STEPS:
            return 0.0
        mean = sum(self._recent) / STEPS
        self._lowest = min(self._lowest, mean)
        return mean - self._lowest
