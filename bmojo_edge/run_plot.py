"""Curves of training runs, drawn from their logs with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmojo_edge import run_log
from bmojo_edge.run_log import Record


def _series(records: list[Record], key: str) -> tuple[list[float], list[float]]:
    """Tokens read and the values of `key`, at the steps that have one."""
    start = next((r for r in records if "event" in r), {})
    per_step = start.get("tokens_per_step", 1)
    found = [(r["step"] * per_step, r[key]) for r in records if r.get(key) is not None and "step" in r]
    return [x for x, _ in found], [y for _, y in found]


def plot(runs: Sequence[Path], out: Path) -> None:
    """Draw loss, validation loss (dots) and learning rate of runs over tokens into a .png or .svg file.

    Raises RunLogError naming the file where a run has no log, or no step in it.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    logs = [(run.name if run.is_dir() else run.parent.name, run_log.read(run)) for run in runs]
    for run, (_, records) in zip(runs, logs, strict=True):
        if not any("loss" in record for record in records):
            raise run_log.RunLogError(f"{run}: no step has been logged yet")
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=[3, 1], layout="constrained"
    )
    for name, records in logs:
        _draw(above, below, name, records)
    above.set_ylabel("loss (nats a token)")
    above.legend()
    below.set_ylabel("learning rate")
    below.set_xlabel("tokens")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    partial = out.with_name(f".{out.name}.partial")
    try:
        figure.savefig(partial, format=out.suffix.removeprefix("."), dpi=150)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
        pyplot.close(figure)


def _draw(above: Any, below: Any, name: str, records: list[Record]) -> None:
    (line,) = above.plot(*_series(records, "loss"), linewidth=1, label=name)
    tokens, losses = _series(records, "valid_loss")
    if tokens:
        above.plot(tokens, losses, "o-", markersize=4, color=line.get_color(), label=f"{name}, validation")
    below.plot(*_series(records, "lr"), linewidth=1, color=line.get_color())
