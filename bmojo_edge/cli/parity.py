"""`bmojo-edge parity`: what a model computes on one machine, recorded, and checked on another."""

from __future__ import annotations

import json as json_format
import math
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bmojo_edge.cli.failures import Debug, clear_errors
from bmojo_edge.cli.terminal import console, size

if TYPE_CHECKING:
    from bmojo_edge.parity import Engine
    from bmojo_edge.parity_check import Comparison

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Record what a model computes on one machine, and check another machine against it.",
)


class EngineName(StrEnum):
    """What can compute a model."""

    reference = "reference"
    torch = "torch"
    mlx = "mlx"


class Device(StrEnum):
    """Where PyTorch can compute."""

    cpu = "cpu"
    cuda = "cuda"


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A model folder of ours.")]
EngineOption = Annotated[
    EngineName | None, typer.Option("--engine", help="Left out: MLX, or PyTorch where MLX is missing or with --device.")
]
DeviceOption = Annotated[
    Device | None, typer.Option("--device", help="Where PyTorch computes; MLX takes the GPU of a Mac by itself.")
]


@app.command("record")
@clear_errors
def record(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")],
    engine: EngineOption = None,
    device: DeviceOption = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="How many tokens to feed; left out: enough to fill every memory.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file.")] = False,
    debug: Debug = False,
) -> None:
    """Record logits, eidetic sets, and every layer's output and memories, as this machine computes them.

    [bold]Examples[/]

    bmojo-edge parity record DIR --out cuda.safetensors --device cuda

    bmojo-edge parity record DIR --out oracle.safetensors --engine reference --tokens 200
    """
    from bmojo_edge import parity

    if out.exists() and not overwrite:
        raise parity.ParityError(f"{out}: exists; choose another name, or --overwrite replaces it")
    made_by = _open(folder, engine, device)
    with console.status("Recording"):
        made = parity.record(folder, made_by, tokens)
    made.save(out)
    n = len(made.tokens)
    lengths = parity.borders(made.config)
    crossed, missed = ([name for name in lengths if (lengths[name] < n) == over] for over in (True, False))
    print(f"{out}: {n:,} tokens, {size(out.stat().st_size)}, made by {_shown(made.engine)}")
    if crossed:
        print(f"filled and overrun: {', '.join(crossed)}")
    if missed:
        console.print(f"[yellow]{n:,} tokens are too few to overrun: {', '.join(missed)}[/]")


@app.command("check")
@clear_errors
def check(
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A record of the same model.")],
    engine: EngineOption = None,
    device: DeviceOption = None,
    bound: Annotated[
        float | None, typer.Option(min=0.0, help="The largest error allowed; left out: that of the model's dtype.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
    debug: Debug = False,
) -> None:
    """Compute a record's tokens here and compare: a table of errors by layer and memory; exit 1 beyond the bound.

    [bold]Examples[/]

    bmojo-edge parity check DIR cuda.safetensors

    bmojo-edge parity check DIR cuda.safetensors --engine torch --json
    """
    from bmojo_edge.parity import Record
    from bmojo_edge.parity_check import check as compare

    record = Record.open(file)
    made_by = _open(folder, engine, device)
    with console.status("Computing the same here"):
        comparison = compare(folder, record, made_by, bound)
    if json:
        print(json_format.dumps(comparison.as_json(), indent=2, ensure_ascii=False))
    else:
        _print(comparison)
    if comparison.failures:
        raise typer.Exit(1)


def _open(folder: Path, engine: EngineName | None, device: Device | None) -> Engine:
    """The model of a folder on the engine asked for."""
    if device is not None and engine not in (None, EngineName.torch):
        raise typer.BadParameter(f"--device is PyTorch's, it says nothing to --engine {engine}")
    if engine is None:
        engine = EngineName.mlx if device is None and find_spec("mlx") is not None else EngineName.torch
    with console.status(f"Loading {escape(str(folder))}"):
        if engine is EngineName.reference:
            from bmojo_edge.parity import Oracle

            return Oracle(folder)
        if engine is EngineName.mlx:
            from bmojo_edge.mlx.parity import Observed

            return Observed(folder)
        from bmojo_edge.torch.parity import Observed

        return Observed(folder, (device or Device.cpu).value)


def _shown(engine: dict[str, str]) -> str:
    return f"{engine['engine']} {engine['version']} on {engine['device']} (kernels: {engine['kernels']})"


def _print(comparison: Comparison) -> None:
    """The table of errors and what follows from it, on stdout."""
    from bmojo_edge.parity_check import MEMORIES

    out = Console(highlight=False, width=max(120, console.width))
    record = comparison.record
    out.print(f"{escape(record.model)}, {len(record.tokens):,} tokens, {comparison.dtype}")
    out.print(f"recorded by {escape(_shown(record.engine))}", soft_wrap=True)
    out.print(f"checked by  {escape(_shown(comparison.engine))}", soft_wrap=True)
    columns = [name for name in MEMORIES if any(name in layer.errors for layer in comparison.layers)]
    chosen = any("innovation" in layer.errors for layer in comparison.layers)
    table = Table(box=None, pad_edge=False)
    for name in ("layer", *columns, *(["sets swapped"] if chosen else [])):
        table.add_column(name, no_wrap=True)
    for layer in comparison.layers:
        cells = [_error(layer.errors.get(name), comparison.bound) for name in columns]
        sets = f"{layer.swapped} of {comparison.chunks}" + (", [bold red]wrong[/]" if layer.wrong_sets else "")
        table.add_row(f"{layer.index} {layer.kind}", *cells, *([sets] if "innovation" in layer.errors else []))
    out.print(table)
    out.print(f"logits {_error(comparison.logits, comparison.bound)}, the bound is {comparison.bound:.1e}")
    for sentence in comparison.failures:
        console.print(f"[bold red]failed:[/] {escape(sentence)}", soft_wrap=True)
    if not comparison.failures:
        out.print("[green]The same, but for rounding.[/]")


def _error(error: float | None, bound: float) -> str:
    if error is None:
        return ""
    shown = f"{error:.1e}" if math.isfinite(error) else "not equal"
    return shown if error <= bound else f"[bold red]{shown}[/]"
