"""The command line, `bmojo-edge`: one command a file. Heavy things are imported inside the commands."""

from __future__ import annotations

from typing import Annotated

import typer

from bmojo_edge import __version__
from bmojo_edge.cli import (
    chat,
    convert,
    data,
    doctor,
    eval,
    export,
    generate,
    info,
    inspect,
    memory,
    parity,
    serve,
    train,
)

app = typer.Typer(
    name="bmojo-edge",
    help="Language models with the B'MOJO memories: they run, convert and chat in constant memory.",
    epilog="A command's own --help has its options and examples. Start with: [bold]bmojo-edge chat[/]",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.command("convert")(convert.convert)
app.command("info")(info.info)
app.command("inspect")(inspect.inspect)
app.command("serve")(serve.serve)
app.command("eval")(eval.evaluate)
app.command("doctor")(doctor.doctor)
app.add_typer(data.app, name="data")
app.add_typer(memory.app, name="memory")
app.add_typer(train.app, name="train")
app.add_typer(parity.app, name="parity")
app.add_typer(export.app, name="export")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bmojo-edge {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; exits with 0, 1 (failure), 2 (misuse) or 130 (interrupted)."""
    app(prog_name="bmojo-edge")
