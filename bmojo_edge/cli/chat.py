"""`bmojo-edge chat`: a conversation in the terminal, or one answer for a script."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from bmojo_edge.cli import options
from bmojo_edge.cli.failures import Debug, clear_errors, say_error
from bmojo_edge.cli.models import open_model
from bmojo_edge.cli.terminal import console, read_stdin, size, write

if TYPE_CHECKING:
    from bmojo_edge.generate import Options
    from bmojo_edge.session import Session

HELP = """/help          this list
/rewind [N]    take back the last N exchanges (1)
/reset         begin again
/exit          leave; so does Ctrl-D"""


@clear_errors
def chat(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A model folder or hub id; left out: a small real model, made once."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this once and exit; - reads it from stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="The system message.")] = None,
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
    """
    if temperature is None:
        temperature = 0.6 if prompt is None else 0.0
    options.check(temperature, top_p, top_k, min_p, repetition_penalty, [])
    text = read_stdin() if prompt == "-" else prompt
    lm = open_model(model)
    from bmojo_edge.session import Session

    sampling: Options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    if text is not None:
        session = Session(lm, system)
        _answer(session, text, sampling)
        _status(session)
    else:
        _Conversation(lambda: Session(lm, system), sampling).run()


def _answer(session: Session, text: str, sampling: Options) -> float | None:
    """Stream an answer to stdout; tokens per second, None where there is nothing to measure."""
    first = last = 0.0
    for piece in session.say(text, **sampling):
        last = time.perf_counter()
        first = first or last
        write(piece)
    write("\n")
    n = len(session.turns[-1].answer_ids)
    return (n - 1) / (last - first) if n > 1 and last > first else None


def _status(session: Session, speed: float | None = None, stopped: str = "") -> None:
    """Position and bytes of the state, on stderr."""
    config = session.config
    state = f"state {size(session.nbytes)}, " + ("growing" if config.growing_layers else "constant")
    parts = [f"position {session.position:,}", state]
    parts += [f"{speed:.1f} tokens/s"] if speed else []
    parts += [stopped] if stopped else []
    console.print(f"[dim]{' · '.join(parts)}[/]\n", soft_wrap=True)


class _Conversation:
    """The loop of questions, answers and commands; `begin` makes a fresh session."""

    def __init__(self, begin: Callable[[], Session], sampling: Options) -> None:
        self._begin = begin
        self._session = begin()
        self._sampling = sampling
        self._interrupted = False  # whether the last thing that happened was Ctrl-C

    def run(self) -> None:
        if sys.stdin.isatty():
            import readline  # noqa: F401 - editing and history for input()

            console.print("[dim]/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.[/]")
        while True:
            try:
                if not self._exchange():
                    return
            except KeyboardInterrupt:  # not while answering
                write("\n")
                if self._interrupted:
                    return
                self._interrupted = True
                console.print("[dim]Ctrl-C again or Ctrl-D leaves.[/]")

    def _exchange(self) -> bool:
        """Read a line and do what it says; whether the conversation goes on."""
        try:
            text = input(_prompt() if sys.stdin.isatty() else "").strip()
        except EOFError:
            write("\n" if sys.stdin.isatty() else "")
            return False
        self._interrupted = False
        if text.startswith("/"):
            return self._command(*text.split())
        if text:
            self._say(text)
        return True

    def _say(self, text: str) -> None:
        speed, stopped = None, ""
        try:
            speed = _answer(self._session, text, self._sampling)
            if self._session.turns[-1].finish_reason == "length":
                stopped = f"cut at {self._sampling.get('max_tokens')} tokens (--max-tokens)"
        except KeyboardInterrupt:
            write("\n")
            self._interrupted, stopped = True, "stopped"
        except ValueError as error:  # the template or the tokenizer refuses the text; the conversation stands
            say_error(str(error))
            return
        _status(self._session, speed, stopped)

    def _command(self, name: str, *arguments: str) -> bool:
        """Do what a slash command says; whether the conversation goes on."""
        if name == "/exit":
            return False
        if name == "/help":
            console.print(escape(HELP))
        elif name == "/reset":
            self._session = self._begin()
            _status(self._session)
        elif name == "/rewind":
            try:
                self._session.rewind(int(arguments[0]) if arguments else 1)
                _status(self._session)
            except ValueError as error:
                say_error(f"/rewind {error}")
        else:
            say_error(f"{name}: no such command; /help lists them")
        return True


def _prompt() -> str:
    """What stands before a question; readline must be told which characters take no room."""
    return "\001\033[1;36m\002› \001\033[0m\002" if console.is_terminal and not console.no_color else "› "
