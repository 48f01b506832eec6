"""Recall of full, windowed, SSM, hybrid and B'MOJO models, given the same chance: fills a GPU, survives being cut off.

    python -m apps.repro.sweep --list                       # what would be run, in order of importance
    python -m apps.repro.sweep --device cuda --minutes 25   # run it; start again to go on
    python -m apps.repro.sweep --stage recall seeds         # only these parts

A cell that ended is written to results/TASK.json at once and never run again; one that was cut off starts anew.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from apps import report
from apps.repro.models import MODELS, config_of, matching_state, memory_bytes
from apps.repro.tasks import TASKS, Examples
from apps.repro.training import Recipe, Run, train_together

RESULTS = Path(__file__).parent / "results"
RATES = (1e-3, 3e-3, 1e-2)
TEST, FAR, FAR_LENGTH = 1_000, 256, 1024
WINDOW, EIDETIC, STATE = 32, 128, 16
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One model on one task with one recipe: what a row of the results is about."""

    model: str
    pairs: int
    lr: float
    seed: int = 0
    task: str = "mqar"
    seq_len: int = 256
    d_model: int = 64
    window: int = WINDOW
    n_eidetic: int = EIDETIC
    d_state: int = STATE
    ssm_lr: float = 1.0
    train: int = 20_000  # examples
    epochs: int = 32  # at most
    batch: int = 128
    options: tuple[tuple[str, Any], ...] = field(default=())  # B'MOJO's own fields

    def sizes(self) -> dict[str, Any]:
        """The keyword arguments of `config_of` that do not name the state."""
        vocab = TASKS[self.task].vocab_size
        found = {"d_model": self.d_model, "window": self.window, "n_eidetic": self.n_eidetic}
        return {"vocab_size": vocab, **found, **{name: _table(value) for name, value in self.options}}

    def key(self) -> Row:
        """The fields that make a row this cell's."""
        found = {**asdict(self), "options": {name: _table(value) for name, value in self.options}}
        return {**found, "n_eidetic": self.n_eidetic if self.model == "bmojo" else 0}


def _table(value: Any) -> Any:
    """A value of `options`; tables are tuples of pairs there, to be hashable."""
    return dict(value) if isinstance(value, tuple) else value


# --- what to run, most important first --------------------------------------------------------------------------------


def _best_rates(rows: Iterable[Row], like: Cell) -> list[Cell]:
    """`like` with the learning rate that its seed 0 did best with; empty where no rate has been tried."""
    free = ("lr", "seed", "train", "epochs", "batch")
    fields = {name: value for name, value in like.key().items() if name not in free}
    tried = [row for row in rows if row["seed"] == 0 and all(row[name] == fields[name] for name in fields)]
    if not tried:
        return []
    best = max(tried, key=lambda row: (row["accuracy"], -row["steps"]))
    return [Cell(**{**_arguments(like), "lr": best["lr"]})]


def _arguments(cell: Cell) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in cell.__dataclass_fields__}


def _with(cells: Iterable[Cell], **changes: Any) -> list[Cell]:
    return [Cell(**{**_arguments(cell), **changes}) for cell in cells]


def _models(pairs: int, d_model: int, **more: Any) -> list[Cell]:
    """Every model at one difficulty; SSM and hybrid also with a state enlarged to B'MOJO's memory."""
    cells = [Cell(model, pairs, RATES[0], d_model=d_model, **more) for model in ("bmojo", "bmojo-f", "hybrid", "mamba")]
    cells += [_equal_memory(cell) for cell in cells if cell.model != "bmojo"]
    return [*cells, *(Cell(model, pairs, RATES[0], d_model=d_model, **more) for model in ("transformer", "window"))]


def _equal_memory(cell: Cell) -> Cell:
    whole = config_of("bmojo", d_state=STATE, **cell.sizes())
    budget = memory_bytes(whole, cell.seq_len)["total"]
    (found,) = _with([cell], d_state=matching_state(cell.model, budget, cell.seq_len, **cell.sizes()))
    return found


def _rates(cells: Iterable[Cell]) -> list[Cell]:
    return [changed for cell in cells for lr in RATES for changed in _with([cell], lr=lr)]


def _tried(rows: Iterable[Row], cells: Iterable[Cell]) -> list[Cell]:
    rows = list(rows)
    return [best for cell in cells for best in _best_rates(rows, cell)]


def stage_recall(rows: Iterable[Row]) -> list[Cell]:
    """64 pairs, width 64: every model, every learning rate."""
    return _rates(_models(64, 64))


def stage_seeds(rows: Iterable[Row]) -> list[Cell]:
    """Two more seeds at the best learning rate."""
    best = _tried(rows, _models(64, 64))
    return [changed for seed in (1, 2) for changed in _with(best, seed=seed)]


def stage_slots(rows: Iterable[Row]) -> list[Cell]:
    """Recall against the number of eidetic slots."""
    best = _tried(rows, [Cell("bmojo", 64, RATES[0])])
    return [changed for n in (64, 32, 96, 192, 16) for changed in _with(best, n_eidetic=n)]


def stage_wide(rows: Iterable[Row]) -> list[Cell]:
    """64 pairs, width 128."""
    return _rates(_models(64, 128))


def stage_easy(rows: Iterable[Row]) -> list[Cell]:
    """16 and 32 pairs, both widths."""
    return [cell for pairs in (32, 16) for d in (64, 128) for cell in _rates(_models(pairs, d))]


def stage_wide_seeds(rows: Iterable[Row]) -> list[Cell]:
    """Two more seeds at width 128."""
    best = _tried(rows, _models(64, 128))
    return [changed for seed in (1, 2) for changed in _with(best, seed=seed)]


def stage_choices(rows: Iterable[Row]) -> list[Cell]:
    """What the choices of B'MOJO are worth: innovation signal, error, taps, fading length, chunk, SSM learning rate."""
    best = _tried(rows, [Cell("bmojo", 64, RATES[0])])
    innovations: list[dict[str, Any]] = [{"signal": "input"}, {"error": "l2"}, *({"taps": n} for n in (1, 2, 8))]
    changes: list[dict[str, Any]] = [{"options": (("innovation", tuple(sorted(x.items()))),)} for x in innovations]
    changes += [{"options": (("n_fading", n),)} for n in (1, 16, 64)]
    changes += [{"options": (("chunk", n),)} for n in (8, 16)]
    changes += [{"ssm_lr": ratio} for ratio in (0.2, 5.0)]
    return [changed for change in changes for changed in _with(best, **change)]


def stage_long(rows: Iterable[Row]) -> list[Cell]:
    """Beyond the paper: 512 tokens."""
    return _rates(_models(64, 64, seq_len=512))


def stage_others(rows: Iterable[Row]) -> list[Cell]:
    """Selective copying, induction heads, noisy and fuzzy recall."""
    pairs = {"selective_copying": 16, "induction_heads": 1, "noisy_recall": 32, "fuzzy_recall": 16}
    return [cell for task, n in pairs.items() for cell in _rates(_models(n, 64, task=task))]


STAGES: dict[str, Callable[[Iterable[Row]], list[Cell]]] = {
    "recall": stage_recall,
    "seeds": stage_seeds,
    "slots": stage_slots,
    "wide": stage_wide,
    "easy": stage_easy,
    "wide-seeds": stage_wide_seeds,
    "choices": stage_choices,
    "long": stage_long,
    "others": stage_others,
}


# --- results ----------------------------------------------------------------------------------------------------------


class Results:
    """Rows on disk, a file a task, rewritten whole after each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, list[Row]] = {}
        for path in sorted(folder.glob("*.json")):
            try:
                self.rows[path.stem] = json.loads(path.read_text(encoding="utf-8"))["rows"]
            except (ValueError, KeyError) as error:
                raise SystemExit(f"{path}: is not a results file ({error}); move it away to start anew") from None

    def all(self) -> list[Row]:
        """Rows of every task."""
        return [row for rows in self.rows.values() for row in rows]

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Cells without a row."""
        have, keys = self.all(), [*dict.fromkeys(cells)]
        return [cell for cell in keys if not any(all(row.get(k) == v for k, v in cell.key().items()) for row in have)]

    def add(self, row: Row) -> None:
        """Keep a row, whatever happens next."""
        rows = self.rows.setdefault(row["task"], [])
        rows.append(row)
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else report.machine()
        report.write(self.folder / f"{row['task']}.json", rows, ("torch", "triton", "numpy"), device=name)


# --- running ----------------------------------------------------------------------------------------------------------


@functools.cache
def examples(task: str, n: int, seq_len: int, pairs: int, seed: int) -> Examples:
    """The same examples for every model. Training and test sets differ by their seed."""
    return TASKS[task].make(np.random.default_rng(seed), n, seq_len, pairs)


def _start(cell: Cell, device: torch.device) -> Run:
    config = config_of(cell.model, d_state=cell.d_state, **cell.sizes())
    recipe = Recipe(cell.lr, cell.seed, cell.epochs, cell.batch, ssm_lr=cell.ssm_lr)
    train = examples(cell.task, cell.train, cell.seq_len, cell.pairs, 1)
    return Run(config, train, examples(cell.task, TEST, cell.seq_len, cell.pairs, 2), recipe, device)


def _row(cell: Cell, run: Run) -> Row:
    outcome, config = run.outcome, run.model.config
    memory = memory_bytes(config, cell.seq_len)
    row = {**cell.key(), "memory_bytes": memory["total"], "memory": memory, **asdict(outcome)}
    row["params"] = sum(p.numel() for p in run.model.parameters())
    if cell.task == "mqar":
        row["far_accuracy"] = run.score(examples("far_queries", FAR, FAR_LENGTH, cell.pairs, 3))
    return row


def run_cells(cells: list[Cell], results: Results, args: argparse.Namespace, more_time: Callable[[], bool]) -> int:
    """Run cells, keep their rows; the number that ended."""
    device, done, names = torch.device(args.device), 0, {}

    def starts() -> Iterator[Callable[[], Run]]:
        for cell in cells:

            def start(cell: Cell = cell) -> Run:
                run = _start(cell, device)
                names[id(run)] = cell
                return run

            yield start

    for run in train_together(starts(), args.at_once, more_time):
        cell = names.pop(id(run))
        row = _row(cell, run)
        results.add(row)
        done += 1
        print(
            f"{cell.task} {cell.model:12} pairs {cell.pairs:3} d {cell.d_model:3} state {cell.d_state:3} "
            f"e {row['n_eidetic']:3} lr {cell.lr:.0e} seed {cell.seed}: {row['accuracy']:.3f} "
            f"(far {row.get('far_accuracy', float('nan')):.3f}) after {row['steps']} steps, {row['seconds']:.0f} s",
            flush=True,
        )
    return done


def show(cells: dict[str, list[Cell]], results: Results) -> None:
    """A table of what is left, by stage."""
    table = Table("stage", "cells", "left", "what")
    for name, planned in cells.items():
        left = len(results.missing(planned))
        table.add_row(name, str(len(planned)), str(left), (STAGES[name].__doc__ or "").splitlines()[0])
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop when this much time has passed")
    parser.add_argument("--at-once", type=int, default=6, metavar="N", help="models trained side by side")
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--train", type=int, default=Cell.train, help="training examples")
    parser.add_argument("--epochs", type=int, default=Cell.epochs)
    parser.add_argument("--batch", type=int, default=Cell.batch)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true", help="show what is left and stop")
    args = parser.parse_args()
    results = Results(args.out)

    def planned(stage: str) -> list[Cell]:
        size = {"train": args.train, "epochs": args.epochs, "batch": args.batch}
        rows = [row for row in results.all() if all(row[name] == value for name, value in size.items())]
        return [cell for cell in _with(STAGES[stage](rows), **size) if cell.model in args.model]

    if args.list:
        show({stage: planned(stage) for stage in args.stage}, results)
        return
    torch.set_float32_matmul_precision("high")
    end, ended = time.monotonic() + 60 * args.minutes, 0
    for stage in args.stage:
        cells = planned(stage)
        left = results.missing(cells)
        print(f"{stage}: {len(left)} of {len(cells)} cells left", flush=True)
        ended += run_cells(left, results, args, lambda: time.monotonic() < end)
        if time.monotonic() >= end:
            print("out of time; start again to go on", file=sys.stderr)
            break
    print(f"{ended} cells ended")


if __name__ == "__main__":
    main()
