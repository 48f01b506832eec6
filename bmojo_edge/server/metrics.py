"""Counters and gauges in the text form that Prometheus reads. This module knows neither HTTP nor models."""

from __future__ import annotations

from collections.abc import Mapping

COUNTERS = {
    "requests": "Requests for text, the refused ones included.",
    "answers": "Answers that were finished.",
    "refused": "Requests refused because the server was busy.",
    "cancelled": "Answers that ended early: the client went away, or the time was over.",
    "tokens": "Tokens generated.",
    "prompt_tokens": "Tokens of the prompts of finished answers.",
    "cached_tokens": "Of these, the ones a kept state had taken in already.",
}


class Metrics:
    """Counts since the start; used from one thread."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(COUNTERS, 0)

    def add(self, name: str, count: int = 1) -> None:
        """Count something."""
        self._counts[name] += count

    def text(self, jobs: Mapping[str, int], slot_bytes: int) -> str:
        """All of them, with gauges of how many jobs are where and of the bytes of a state."""
        lines = []
        for name, count in self._counts.items():
            full = f"bmojo_{name}_total"
            lines += [f"# HELP {full} {COUNTERS[name]}", f"# TYPE {full} counter", f"{full} {count}"]
        for name, count in {**jobs, "slot_bytes": slot_bytes}.items():
            lines += [f"# TYPE bmojo_{name} gauge", f"bmojo_{name} {count}"]
        return "\n".join(lines) + "\n"
