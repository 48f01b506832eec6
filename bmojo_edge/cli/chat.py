"""`bmojo-edge chat`: a conversation in the terminal, or one answer for a script."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bmojo_edge.cli import options
from bmojo_edge.cli.failures import Debug, clear_errors
from bmojo_edge.cli.models import is_default, of_session, open_model
from bmojo_edge.cli.terminal import read_stdin

if TYPE_CHECKING:
    from bmojo_edge.engine import LM


@clear_errors
def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model folder, an export or hub id; left out: the saved session's, or a small one.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this once and exit; - reads it from stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="The system message.")] = None,
    session: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Go on with the conversation in this file, and save it after each answer."),
    ] = None,
    transcript: Annotated[
        bool, typer.Option("--transcript", help="Also append what is said to FILE.jsonl, which grows.")
    ] = False,
    memory: Annotated[
        Path | None,
        typer.Option(metavar="STORE", help="Recall what is in this store, and keep there what leaves the window."),
    ] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.ChatTemperature = None,
    top_p: options.TopP = 0.9,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    debug: Debug = False,
) -> None:
    """Chat with a model. Its answers go to stdout, everything else to stderr.

    In a conversation Ctrl-C stops the answer; Ctrl-D, or Ctrl-C twice, ends the program; /help lists the rest.

    [bold]Examples[/]

    bmojo-edge chat

    bmojo-edge chat DIR --system "Be brief." --temp 0.5 --seed 1

    bmojo-edge chat DIR --prompt "What is the capital of France?"

    bmojo-edge chat DIR --session diary.bmojo

    bmojo-edge chat --memory notes/
    """
    if temperature is None:
        temperature = 0.6 if prompt is None else 0.0
    if transcript and session is None:
        raise typer.BadParameter("--transcript stands beside the file of --session")
    sampling = options.chosen(max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed)
    text = read_stdin() if prompt == "-" else prompt
    made = None  # what the file holds already was made with
    if session is not None and session.exists() and session.stat().st_size > 0:
        from bmojo_edge.session_file import SessionError, origin

        made = origin(session)
        model, memory = of_session(session, made, model, memory)
        if model is None and memory is None and made.model is not None and not is_default(made.model):
            raise SessionError(f"{session}: its model is no longer at {made.model}; name it: bmojo-edge chat MODEL")
    with _model(model, memory) as lm:
        from bmojo_edge.cli.conversation import Conversation, SessionFile, answer, append_transcript, resumed, status
        from bmojo_edge.session import Session
        from bmojo_edge.session_file import check_replaceable

        def begin() -> Session:
            return Session(lm, system)

        file = SessionFile(session) if session else None
        here = Session.open(file.path, lm) if file and made else begin()
        if file and made:
            if system not in (None, here.system):
                raise typer.BadParameter(
                    f"--system: {session} has another system message; leave it out or begin a new file"
                )
            check_replaceable(file.path)
            resumed(here, made)
        elif file:
            file.save(here)  # where it cannot be written, that shows before the first question
        if text is None:
            Conversation(begin, sampling, here, file, transcript).run()
            return
        answer(here.say(text, **sampling))
        if file is not None:
            file.save(here)
            if transcript:
                append_transcript(file.path, here)
        status(here)


@contextmanager
def _model(model: str | None, memory: Path | None) -> Iterator[LM]:
    """The model, with a store beside it where one is named; a store that is not there is made."""
    if memory is None:
        yield open_model(model)
        return
    from bmojo_edge.cli.memory import opened

    lm = opened(memory, model, disk_gb=0.0)
    with lm.store:
        yield lm
