"""Recall of full, windowed, SSM, hybrid and B'MOJO models, given the same chance: fills GPUs, survives being cut off.

    python -m apps.repro.sweep --list                       # what would be run, in order of importance
    python -m apps.repro.sweep --device cuda --minutes 25   # run it on every GPU there is; start again to go on
    python -m apps.repro.sweep --stage recall seeds         # only these parts

A cell that ended is written to results/TASK.json at once and never run again; one that was cut off starts anew.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from apps import report
from apps.repro.cells import STAGES, Cell, Row, changed
from apps.repro.inside import by_distance, what_is_kept
from apps.repro.ledger import Ledger, missing
from apps.repro.models import MODELS, config_of, memory_bytes
from apps.repro.tasks import TASKS
from apps.repro.training import Questions, Recipe, Run, questions, train_together

RESULTS = Path(__file__).parent / "results"
TEST, FAR, FAR_LENGTH = 1_000, 256, 1024


@functools.cache
def examples(task: str, n: int, seq_len: int, pairs: int, seed: int, device: torch.device) -> Questions:
    """The same examples for every model. Training and test sets differ by their seed."""
    return questions(TASKS[task].make(np.random.default_rng(seed), n, seq_len, pairs), device)


def _start(cell: Cell, device: torch.device) -> Run:
    config = config_of(cell.model, d_state=cell.d_state, expand=cell.expand, rotary=cell.rotary, **cell.sizes())
    recipe = Recipe(cell.lr, cell.seed, cell.epochs, cell.batch, fresh=cell.fresh, ssm_lr=cell.ssm_lr)
    count = cell.train * (cell.epochs if cell.fresh else 1)
    train = examples(cell.task, count, cell.seq_len, cell.pairs, 1, device)
    return Run(config, train, examples(cell.task, TEST, cell.seq_len, cell.pairs, 2, device), recipe, device)


def _row(cell: Cell, run: Run) -> Row:
    outcome, config = run.outcome, run.model.config
    memory = memory_bytes(config, cell.seq_len)
    row = {**cell.key(), "memory_bytes": memory["total"], "memory": memory, **asdict(outcome)}
    row["params"] = sum(p.numel() for p in run.model.parameters())
    row["device"] = torch.cuda.get_device_name() if run.device.type == "cuda" else report.machine()
    if cell.task == "mqar":
        tokens, targets, columns = (x.cpu().numpy() for x in run.test)
        right = run.answers(run.test).cpu().numpy() == np.take_along_axis(targets, columns, 1)
        row["by_distance"] = by_distance(tokens, right, columns, cell.pairs, cell.window // 2)
        row["far_accuracy"] = run.score(examples("far_queries", FAR, FAR_LENGTH, cell.pairs, 3, run.device))
        if cell.model == "bmojo" and cell.n_eidetic:
            row["kept"] = what_is_kept(run.model, tokens, targets, cell.pairs)
    return row


def run_cells(claim: Callable[[], Cell | None], ledger: Ledger, args: argparse.Namespace, end: float) -> int:
    """Run the cells that `claim` gives until it gives none, keep their rows; the number that ended."""
    device, done = torch.device(args.device), 0
    cells: dict[int, Cell] = {}

    def starts() -> Iterator[Callable[[], Run]]:
        while (cell := claim()) is not None:

            def start(cell: Cell = cell) -> Run:
                run = _start(cell, device)
                cells[id(run)] = cell
                return run

            yield start

    for run in train_together(starts(), args.at_once, lambda: time.monotonic() < end):
        cell = cells.pop(id(run))
        row = _row(cell, run)
        ledger.add(row)
        done += 1
        more = {"expand": cell.expand, "rotary": cell.rotary, **dict(cell.options), "ssm_lr": cell.ssm_lr}
        unusual = {name: value for name, value in more.items() if value != getattr(Cell, name, None)}
        print(
            f"{cell.task} {cell.model:12} {cell.seq_len} tokens, pairs {cell.pairs:3} d {cell.d_model:3} "
            f"state {cell.d_state:3} e {row['n_eidetic']:3} lr {cell.lr:.0e} seed {cell.seed} {unusual or ''}: "
            f"{row['accuracy']:.3f} (far {row.get('far_accuracy', float('nan')):.3f}) "
            f"after {row['steps']} steps, {row['seconds']:.0f} s",
            flush=True,
        )
    return done


def show(stages: dict[str, list[Cell]], rows: list[Row]) -> None:
    """A table of what is left, by stage."""
    table = Table("stage", "cells", "left", "what")
    for name, planned in stages.items():
        what = (STAGES[name].__doc__ or "").splitlines()[0]
        table.add_row(name, str(len(planned)), str(len(missing(planned, rows))), what)
    Console().print(table)


def planned(stage: str, rows: Iterable[Row], args: argparse.Namespace) -> list[Cell]:
    """Cells of a stage, as the command line changes them."""
    size = {"train": args.train, "batch": args.batch, "fresh": not args.repeated}
    like = [row for row in rows if all(row[name] == value for name, value in {**size, "epochs": args.epochs}.items())]
    longer = lambda cell: cell.epochs * args.epochs // Cell.epochs  # noqa: E731 - a stage may ask for a multiple
    cells = [other for cell in STAGES[stage](like) for other in changed([cell], **size, epochs=longer(cell))]
    return [cell for cell in cells if cell.model in args.model and (args.d_state or cell.d_state) == cell.d_state]


def work(args: argparse.Namespace, claims: Path, end: float) -> None:
    """Run cells in this process, those that no other process with the same claims has taken."""
    torch.set_float32_matmul_precision("high")
    ledger = Ledger(args.out, claims)
    plan = lambda rows: [cell for stage in args.stage for cell in planned(stage, rows, args)]  # noqa: E731
    done = run_cells(lambda: ledger.claim(plan) if time.monotonic() < end else None, ledger, args, end)
    print(f"{done} cells ended", flush=True)
    if time.monotonic() >= end:
        print("out of time; start again to go on", file=sys.stderr)


def work_on_every_gpu(claims: Path, minutes: float) -> None:
    """This program once more for each GPU, all with the same claims."""
    command = [sys.executable, "-m", "apps.repro.sweep", *sys.argv[1:], "--claims", str(claims)]
    running = [
        subprocess.Popen([*command, "--device", f"cuda:{k}", "--minutes", str(minutes)])
        for k in range(torch.cuda.device_count())
    ]
    failed = [process.wait() for process in running]  # all of them, whatever the first says
    if any(failed):
        raise SystemExit("a GPU's process failed; what had ended is kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda: every GPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop when this much time has passed")
    parser.add_argument("--at-once", type=int, default=6, metavar="N", help="models trained side by side on a GPU")
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--d-state", type=int, metavar="N", help="only models with a state of this size")
    parser.add_argument("--train", type=int, default=Cell.train, help="training examples of an epoch")
    parser.add_argument("--repeated", action="store_true", help="the same examples in every epoch")
    parser.add_argument("--epochs", type=int, default=Cell.epochs)
    parser.add_argument("--batch", type=int, default=Cell.batch)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true", help="show what is left and stop")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    if args.list:
        rows = Ledger(args.out, args.out).rows()
        show({stage: planned(stage, rows, args) for stage in args.stage}, rows)
    elif args.claims:
        if args.device != "cpu":
            torch.cuda.set_device(args.device)
        work(args, args.claims, end)
    else:
        with tempfile.TemporaryDirectory() as folder:
            if args.device == "cuda":
                work_on_every_gpu(Path(folder) / "claims", args.minutes)
            else:
                work(args, Path(folder) / "claims", end)


if __name__ == "__main__":
    main()
