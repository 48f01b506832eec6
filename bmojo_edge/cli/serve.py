"""`bmojo-edge serve`: a model behind OpenAI's API."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.markup import escape

from bmojo_edge.cli.failures import Debug, clear_errors
from bmojo_edge.cli.models import open_model
from bmojo_edge.cli.terminal import console

_LIMITS = "Limits"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@clear_errors
def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model folder or hub id; left out: the default model.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8080,
    name: Annotated[str | None, typer.Option(help="The model's name in requests; left out: its folder's.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="BMOJO_EDGE_API_KEY", help="Refuse requests without this key.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Let pages of this origin use the server, as https://x.org; * is any."),
    ] = None,
    state_mib: Annotated[
        int, typer.Option(min=1, help="Memory for states, in MiB; decides --max-sessions.", rich_help_panel=_LIMITS)
    ] = 1024,
    max_sessions: Annotated[
        int | None,
        typer.Option(min=1, help="States held at most; a session takes 2.", rich_help_panel=_LIMITS),
    ] = None,
    max_running: Annotated[
        int, typer.Option(min=1, help="Answers computed in one batch at most.", rich_help_panel=_LIMITS)
    ] = 16,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests that wait at most; more get 429.", rich_help_panel=_LIMITS)
    ] = 64,
    max_prompt: Annotated[
        int, typer.Option(min=1, help="The longest prompt, in tokens.", rich_help_panel=_LIMITS)
    ] = 32_768,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="The longest answer, in tokens.", rich_help_panel=_LIMITS)
    ] = 4_096,
    max_body: Annotated[int, typer.Option(min=1, help="The largest request, in bytes.", rich_help_panel=_LIMITS)] = 2
    ** 20,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds a request may take.", rich_help_panel=_LIMITS)
    ] = 600.0,
    sessions_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where sessions are saved; left out: the cache of bmojo-edge, by model name."),
    ] = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Save sessions, or keep them in memory only.")] = True,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Serve the chat page at /, or only the API.")] = True,
    debug: Debug = False,
) -> None:
    """Serve a model to any client of OpenAI's API, and a chat page to a browser.

    Ctrl-C, or SIGTERM, takes no more requests, gives those that are open 10 seconds to finish, and saves the sessions.

    [bold]Examples[/]

    bmojo-edge serve

    bmojo-edge serve DIR --port 8000 --state-mib 4096

    BMOJO_EDGE_API_KEY=secret bmojo-edge serve DIR --host 0.0.0.0
    """
    if api_key == "":
        raise typer.BadParameter("--api-key: is empty; leave it out to serve without a key")
    if sessions_dir is not None and not save:
        raise typer.BadParameter("--sessions-dir is for sessions that are saved; leave out --no-save")
    for origin in allow_origin or ():
        if origin != "*" and re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin) is None:
            raise typer.BadParameter(
                f"--allow-origin: must be as https://x.org or http://localhost:3000, got {origin!r}"
            )
    from bmojo_convert.default import home
    from bmojo_edge.onnx_runner import MANIFEST
    from bmojo_edge.server import static
    from bmojo_edge.server.app import Limits, build
    from bmojo_edge.server.run import Server

    if model is not None and (Path(model) / MANIFEST).is_file():
        raise typer.BadParameter("MODEL: an export runs one sequence at a time; serve the folder it was made from")
    lm = open_model(model)
    slot = lm.config.state_bytes()
    slots = max_sessions or state_mib * 2**20 // slot
    if slots == 0:
        raise typer.BadParameter(
            f"--state-mib: a state of this model takes {slot / 2**20:.1f} MiB, more than the {state_mib} there are"
        )
    folder = lm.tokenizer.folder if lm.tokenizer is not None else None
    name = name or (folder.resolve().name if folder is not None else Path(model or "model").name)
    limits = Limits(
        slots=slots,
        max_running=max_running,
        max_waiting=max_waiting,
        max_prompt=max_prompt,
        max_tokens=max_tokens,
        max_body=max_body,
        timeout=timeout,
    )
    loopback = host in _LOOPBACK
    sessions = sessions_dir or home() / "sessions" / quote(name, safe="")
    try:
        app = build(
            lm,
            name,
            limits,
            api_key,
            sessions=sessions if save else None,
            pages=static.FOLDER if page else None,
            hosts=frozenset({"127.0.0.1", "[::1]", "localhost"}) if loopback else None,
            origins=frozenset(allow_origin or ()),
        )
    except ValueError as error:
        raise typer.BadParameter(f"MODEL: {error}") from None
    console.print(
        f"{escape(name)}: {slots:,} states of {slot / 2**20:.1f} MiB each in memory, up to {min(max_running, slots)} "
        f"answers at a time; sessions are {f'saved in {escape(str(sessions))}' if save else 'not saved'}",
        soft_wrap=True,
    )
    if api_key is None and (not loopback or "*" in (allow_origin or ())):
        who = "any page in a browser here" if loopback else f"anyone who reaches {escape(host)}"
        console.print(f"[bold yellow]warning:[/] {who} can use this model; see --api-key")
    server = Server(app, host=host, port=port)
    with suppress(SystemExit, KeyboardInterrupt):  # when it cannot listen, and after Ctrl-C has ended it
        server.run()
    if not server.started:
        raise typer.Exit(1)  # it has said why
