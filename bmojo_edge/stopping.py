"""Stop strings in streamed text: what may be the beginning of one is held back until that is certain.

The result depends on the text alone, not on how it was cut into pieces. This module knows no tokens.
"""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Passes text on up to the first stop string, which itself never appears.

    The first is the one that is complete first; of two that end together, the longer.
    Raises ValueError for a stop that is empty or not a string.
    """

    def __init__(self, stop: str | Iterable[str]) -> None:
        self._stops = [stop] if isinstance(stop, str) else list(stop)
        for s in self._stops:
            if not isinstance(s, str) or not s:
                raise ValueError(f"stop: must be strings of at least one character, got {s!r}")
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """The part of the text so far that can be shown now; nothing more once `hit`."""
        if self.hit or not self._stops:
            return "" if self.hit else text
        held = self._held + text
        found = [(at + len(s), at) for s in self._stops if (at := held.find(s)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return held[: min(found)[1]]
        keep = next((n for n in range(min(self._longest - 1, len(held)), 0, -1) if self._may_begin(held[-n:])), 0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def _may_begin(self, tail: str) -> bool:
        return any(s.startswith(tail) for s in self._stops)

    def finish(self) -> str:
        """What was held back, now that no more text comes."""
        text, self._held = self._held, ""
        return text
