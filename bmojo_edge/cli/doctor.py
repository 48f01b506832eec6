"""`bmojo-edge doctor`: what runs on this machine, and whether it computes what it should."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bmojo_edge.cli.failures import Debug, clear_errors
from bmojo_edge.cli.terminal import console, progress_bar, size

if TYPE_CHECKING:
    from bmojo_edge.doctor import Report


@clear_errors
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Check this folder's or hub id's golden prompt; left out: the default model's, if it is there.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
    debug: Debug = False,
) -> None:
    """Tell what runs on this machine, and check it: Metal kernels on the device, a model's golden prompt.

    What cannot be checked here is named and is no failure. Exits with 1 where a kernel or a model is wrong.

    [bold]Examples[/]

    bmojo-edge doctor

    bmojo-edge doctor DIR --json
    """
    from bmojo_edge.doctor import examine

    with progress_bar() as progress:
        report = examine(_default_model() if model is None else model, progress)
    if json:
        print(json_format.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        print_report(report)
    if report.failures:
        raise typer.Exit(1)


def _default_model() -> str | None:
    """The default model where it is already made; it is never made or fetched here."""
    from bmojo_convert.default import default_model_path

    path = default_model_path()
    return str(path) if path.exists() else None


def print_report(report: Report) -> None:
    """The report as tables, on stdout."""
    out = Console(highlight=False)
    facts = {name: str(value) for name, value in report.machine.items()}
    facts["memory"] = size(int(facts.pop("memory_bytes")))
    rows = [(name, escape(value)) for name, value in facts.items()]
    rows += [
        (engine.name, escape(" on ".join(filter(None, (engine.version, engine.device))))) for engine in report.engines
    ]
    out.print(_facts(rows))
    if report.kernels:
        out.print(_kernels(report))
    if report.timings:
        out.print(_timings(report))
    if report.golden.ok:
        out.print(f"[green]golden prompt:[/] {escape(report.golden.detail)} ({escape(str(report.golden.model))})")
    for sentence in report.unchecked:
        out.print(f"[yellow]not checked here:[/] {escape(sentence)}")
    for sentence in report.failures:
        console.print(f"[bold red]failed:[/] {escape(sentence)}", soft_wrap=True)
    if not report.failures:
        out.print("[green]Nothing is wrong.[/]")


def _facts(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _kernels(report: Report) -> Table:
    """A row for each op and dtype: how many sizes, the largest error, and whether all are right."""
    table = Table("kernel", "dtype", "sizes", "largest error", "", title="Metal kernels on this device")
    for op, dtype in dict.fromkeys((check.op, check.dtype) for check in report.kernels):
        checks = [check for check in report.kernels if (check.op, check.dtype) == (op, dtype)]
        errors = [check.error for check in checks if check.error is not None]
        right = sum(check.problem is None for check in checks)
        state = "[green]ok[/]" if right == len(checks) else f"[bold red]{len(checks) - right} wrong[/]"
        table.add_row(op, dtype, str(len(checks)), f"{max(errors):.1e}" if errors else "-", state)
    return table


def _timings(report: Report) -> Table:
    table = Table("kernel", "dtype", "ms", "plain MLX, ms", title="Times of a call at typical sizes")
    for timing in report.timings:
        table.add_row(timing.op, timing.dtype, f"{timing.kernel_ms:.3f}", f"{timing.plain_ms:.3f}")
    return table
