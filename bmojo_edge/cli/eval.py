"""`bmojo-edge eval`: what a model scores on evaluation sets, from files or through lm-evaluation-harness."""

from __future__ import annotations

import json as json_format
import math
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from bmojo_edge.cli.failures import Debug, clear_errors
from bmojo_edge.cli.terminal import console, progress_bar

if TYPE_CHECKING:
    from bmojo_edge.evaluation import Result
    from bmojo_edge.scoring import Scorer


class EngineName(StrEnum):
    """What can compute a model here."""

    mlx = "mlx"
    torch = "torch"


@clear_errors
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    tasks: Annotated[str, typer.Option("--tasks", "-t", metavar="A,B,...", help="Names of sets, with commas between.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A folder of sets in files; left out: lm-evaluation-harness and its tasks."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N examples of each.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="With --data and --limit: N random examples, drawn task after task."),
    ] = None,
    engine: Annotated[
        EngineName | None, typer.Option("--engine", help="Left out: MLX, or PyTorch where MLX is missing.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where PyTorch computes: cpu, cuda, mps.")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Sequences computed together.")] = 8,
    include: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of the harness's task files beside its own.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
    debug: Debug = False,
) -> None:
    """Score a model: accuracy of choices, last words, perplexity, each with its standard error.

    With --data, DIR has JSON lines, plain or .xz: {"ctx", "choices", "gold"}, {"g", "b"} or {"text"}, or plain text
    (.txt, .raw). A task is the name of a file, without its split (_test, _val) if you like. Nothing is downloaded.

    [bold]Examples[/]

    bmojo-edge eval DIR --tasks lambada,hellaswag,piqa,arc_easy --data evals --limit 150 --seed 0

    bmojo-edge eval DIR --tasks arc_easy,gsm8k --engine torch --device cuda --batch 32 --json
    """
    names = list(dict.fromkeys(name for part in tasks.split(",") if (name := part.strip())))
    if not names:
        raise typer.BadParameter("--tasks: give one name or more, with commas between")
    if data is not None and include is not None:
        raise typer.BadParameter("--include is the harness's, it says nothing to --data")
    if seed is not None and (data is None or limit is None):
        raise typer.BadParameter("--seed draws --limit N examples from the sets of --data; give both")
    engine = engine or (EngineName.mlx if find_spec("mlx") is not None else EngineName.torch)
    if engine is EngineName.mlx and device != "cpu":
        raise typer.BadParameter("--device is PyTorch's; MLX takes the GPU of a Mac by itself")
    if engine is EngineName.torch:
        from bmojo_edge.torch.load import check_device

        try:
            check_device(device)
        except ValueError as error:
            raise typer.BadParameter(f"--{error}") from None
    if data is None:
        results = _harness(names, model, engine, device, limit, batch, include)
    else:
        draw = None if seed is None else Random(seed)
        results = _files(names, data, model, engine, device, limit, batch, draw)
    if json:
        found = {"model": model, "engine": engine.value, "limit": limit, "seed": seed, "tasks": _as_json(results)}
        print(json_format.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(results)


def _files(
    names: list[str],
    folder: Path,
    model: str,
    engine: EngineName,
    device: str,
    limit: int | None,
    batch: int,
    draw: Random | None,
) -> dict[str, Result]:
    from bmojo_edge import evaluation

    paths = {name: evaluation.task_path(folder, name) for name in names}
    lm = _open(model, engine, device)
    results = {}
    with progress_bar() as report:
        for name, path in paths.items():
            results[name] = evaluation.evaluate(
                lm, path, limit, batch, lambda done, total, name=name: report(name, done, total), draw
            )
    return results


def _harness(
    names: list[str],
    model: str,
    engine: EngineName,
    device: str,
    limit: int | None,
    batch: int,
    include: Path | None,
) -> dict[str, Result]:
    from difflib import get_close_matches

    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    from bmojo_edge.harness import HarnessLM, results_of

    manager = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if name not in manager.all_tasks:
            near = ", ".join(get_close_matches(name, manager.all_tasks, 8, 0.5)) or "see `lm-eval ls tasks`"
            raise typer.BadParameter(f"--tasks: lm-evaluation-harness has no {name!r}; nearest: {near}")
    lm = _open(model, engine, device)
    with progress_bar() as report:
        adapter = HarnessLM(lm, batch, lambda done, total: report("requests", done, total))
        run: Any = lm_eval.simple_evaluate  # its decorator hides its parameters from type checkers
        found = run(adapter, tasks=names, limit=limit, task_manager=manager, bootstrap_iters=1000)
    return results_of(found)


def _open(model: str, engine: EngineName, device: str) -> Scorer:
    with console.status(f"Loading {escape(model)}"):
        if engine is EngineName.mlx:
            from bmojo_edge.mlx import load

            return load(model)
        from bmojo_edge.torch import load as load_torch

        return load_torch(model, device=device)


def _as_json(results: dict[str, Result]) -> dict[str, Any]:
    """Metrics by task; a standard error that does not exist is null."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        name: {
            "examples": result.examples,
            "metrics": {k: {"value": number(m.value), "stderr": number(m.stderr)} for k, m in result.metrics.items()},
        }
        for name, result in results.items()
    }


def _print(results: dict[str, Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "examples", "metric", "value", "standard error", box=None, pad_edge=False)
    for name, result in results.items():
        for i, (metric, (value, stderr)) in enumerate(result.metrics.items()):
            head = ("", "") if i else (escape(name), f"{result.examples:,}")
            table.add_row(*head, escape(metric), f"{value:.4g}", "" if math.isnan(stderr) else f"{stderr:.2g}")
    Console(highlight=False).print(table)
