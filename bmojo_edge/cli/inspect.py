"""`bmojo-edge inspect`: which tokens a session keeps, and which memories its last answer was read from."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bmojo_edge.cli.failures import Debug, clear_errors
from bmojo_edge.cli.models import of_session, open_model
from bmojo_edge.cli.terminal import read_stdin

if TYPE_CHECKING:
    from bmojo_edge.inspection import Inspection, Kept

SHOWN = 8  # tokens of a layer, where not all are asked for


@clear_errors
def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A session file, or a model folder with --prompt.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="A text for a model folder to read; - reads it from stdin.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The session's model; left out: where it was when saved.")
    ] = None,
    memory: Annotated[
        Path | None, typer.Option(metavar="STORE", help="The session's store; left out: where it was when saved.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help=f"All kept tokens, not the {SHOWN} most surprising.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
    debug: Debug = False,
) -> None:
    """Tell which tokens each layer keeps verbatim, how surprising they were, and where attention went.

    The attention is that of the last answer; of a text given with --prompt, that of its last token.

    [bold]Examples[/]

    bmojo-edge inspect chat.bmojo

    bmojo-edge inspect chat.bmojo --json

    bmojo-edge inspect DIR --prompt "The river runs to the sea."
    """
    found = _of_text(path, prompt, model, memory) if path.is_dir() else _of_session(path, prompt, model, memory)
    if json:
        print(json_format.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        print_inspection(found, Console(highlight=False), every)


def _of_text(folder: Path, prompt: str | None, model: str | None, memory: Path | None) -> Inspection:
    if prompt is None:
        raise typer.BadParameter("a folder is a model: --prompt must give it something to read")
    if model is not None or memory is not None:
        raise typer.BadParameter("--model and --memory are for a session file; the folder is the model")
    text = read_stdin() if prompt == "-" else prompt
    lm = open_model(str(folder))
    from bmojo_edge.generate import prompt_ids
    from bmojo_edge.inspection import inspect_text

    return inspect_text(lm, prompt_ids(lm, text))


def _of_session(path: Path, prompt: str | None, model: str | None, memory: Path | None) -> Inspection:
    if prompt is not None:
        raise typer.BadParameter("--prompt is for a model folder; a session has read what it has")
    from bmojo_edge.cli.memory import opened
    from bmojo_edge.inspection import inspect as look
    from bmojo_edge.session import Session, SessionError
    from bmojo_edge.session_file import origin

    made = origin(path)
    folder, memory = of_session(path, made, model, memory)
    if folder is None:
        raise SessionError(f"{path}: its model is no longer at {made.model}; say where it is with --model")
    if memory is None:
        return look(Session.open(path, open_model(folder)))
    lm = opened(memory, folder, keeps=False)
    with lm.store:
        return look(Session.open(path, lm))


def print_inspection(found: Inspection, out: Console, every: bool = False) -> None:
    """The inspection as tables."""
    if found.attention:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in found.attention.items() if share)
        tokens = f"{found.queries} token{'s' * (found.queries != 1)}"
        out.print(f"[bold]attention[/] of the last answer ({tokens}, mean of all layers): {shares}")
    elif found.unknown:
        out.print(f"[dim]attention: {escape(found.unknown)}[/]")
    sinks = dict.fromkeys(layer.sinks for layer in found.layers if layer.sinks)
    for tokens in sinks:  # the same in every layer that has them
        out.print(f"[bold]sinks[/]  {'  '.join(map(_one, tokens))}")
    table = Table("layer", "attention", "eidetic: text, position, innovation, age", box=None, pad_edge=False)
    for i, layer in enumerate(found.layers):
        shares = " ".join(f"{name} {share:.0%}" for name, share in layer.attention.items() if share >= 0.005)
        best = sorted(layer.eidetic, key=lambda kept: -(kept.innovation or 0.0))[: None if every else SHOWN]
        texts = [_one(kept) for kept in sorted(best, key=lambda kept: kept.position)]
        more = len(layer.eidetic) - len(best)
        texts += [f"[dim]and {more} more[/]"] if more else []
        table.add_row(f"{i} {layer.kind}", shares, "  ".join(texts) or "[dim]nothing[/]")
    out.print(table)
    out.print(f"[dim]at position {found.position:,}[/]")


def _one(kept: Kept) -> str:
    why = "" if kept.innovation is None else f" {kept.innovation:.2f} {kept.age:,}"
    return f"{escape(repr(kept.text))}[dim]@{kept.position:,}{why}[/]"
