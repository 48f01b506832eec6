"""Which results belong together: rows of the comparison, the best of each model, accuracy by slots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from apps.repro.cells import EIDETIC, STATE, WINDOW, Cell, Row

ORDER = ("transformer", "bmojo", "bmojo-f", "hybrid", "mamba", "window")
SLOTS = (16, 32, 64, 96, 128, 192)
Found = dict[str, Any]  # a results file


def name_of(row: Row) -> str:
    """A model as tables and legends name it: positions, an enlarged state or another number of slots are told."""
    more = ["rotary"] if row["rotary"] else []
    if row["d_state"] != STATE:
        more.append(f"state {row['d_state']}" + (f", {row['expand']}x wide" if row["expand"] != 2 else ""))
    if row["model"] == "bmojo" and row["n_eidetic"] != EIDETIC:
        more.append(f"{row['n_eidetic']} slots")
    return f"{row['model']} ({', '.join(more)})" if more else row["model"]


def plain(rows: Iterable[Row]) -> list[Row]:
    """Rows of the comparison itself, without changed options, on fresh examples."""
    return [row for row in usual_recipe(rows) if not row["options"] and row["ssm_lr"] == 1.0]


def usual_recipe(rows: Iterable[Row]) -> list[Row]:
    """Rows of models with the usual window, trained on fresh examples for the usual time."""
    usual = {"fresh": True, "window": WINDOW, "epochs": Cell.epochs}
    return [row for row in rows if all(row[name] == value for name, value in usual.items())]


def usual_slots(rows: Iterable[Row]) -> list[Row]:
    """Rows of models that have the usual number of slots, or none."""
    return [row for row in rows if row["n_eidetic"] in (0, EIDETIC)]


def best_rates(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by cell (task, length, pairs, width, model), those of the learning rate with the best seed 0 only."""
    cells: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row["task"], row["seq_len"], row["pairs"], row["d_model"], name_of(row)].append(row)
    found = {}
    for key, tried in cells.items():
        first = [row for row in tried if row["seed"] == 0]
        lr = max(first or tried, key=lambda row: (row["accuracy"], -row["steps"]))["lr"]
        found[key] = sorted((row for row in tried if row["lr"] == lr), key=lambda row: row["seed"])
    return found


def by_slots(found: Found) -> dict[str, dict[int, float]]:
    """Accuracy of seed 0 by the number of eidetic slots, the best learning rate of each, by pairs and positions."""
    rows = [row for row in plain(found["rows"]) if row["model"] == "bmojo" and row["seed"] == 0]
    rows = [row for row in rows if (row["seq_len"], row["d_model"]) == (256, 64)]
    groups: dict[str, dict[int, float]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: (-row["pairs"], not row["rotary"])):
        of = groups[f"{row['pairs']} pairs, {'rotary' if row['rotary'] else 'no'} positions"]
        of[row["n_eidetic"]] = max(row["accuracy"], of.get(row["n_eidetic"], 0.0))
    return {name: of for name, of in groups.items() if len(of) > 1}
