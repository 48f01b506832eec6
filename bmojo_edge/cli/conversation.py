"""The loop of `bmojo-edge chat`: questions, answers, and commands that begin with a slash.

What is said is saved after each answer where there is a file to save it in; a kill loses at most the answer in hand.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from bmojo_edge.cli.failures import say_error
from bmojo_edge.cli.terminal import console, size, write

if TYPE_CHECKING:
    from bmojo_edge.generate import Options
    from bmojo_edge.session import Session
    from bmojo_edge.session_file import Origin

COMMANDS = {
    "/help": "this list",
    "/rewind [N]": "take back the last N exchanges (1)",
    "/regenerate": "answer the last question anew",
    "/edit [N] TEXT": "say TEXT in place of the question N exchanges ago (1)",
    "/fork [FILE]": "go on in a copy, saved in FILE if given; /back returns to this point",
    "/back": "leave the copy for the conversation it was made from",
    "/save FILE": "save the conversation in a new file, and go on saving it there",
    "/open FILE": "go on with a saved conversation",
    "/memory": "which old tokens the model keeps, and what the last answer was read from",
    "/reset": "begin again",
    "/exit": "leave; so does Ctrl-D",
}


def answer(pieces: Iterator[str]) -> float:
    """Stream an answer to stdout; the seconds from its first piece to its last."""
    first = last = 0.0
    for piece in pieces:
        last = time.perf_counter()
        first = first or last
        write(piece)
    write("\n")
    return last - first


def status(session: Session, speed: float | None = None, stopped: str = "") -> None:
    """Position and bytes of the state, on stderr."""
    state = f"state {size(session.nbytes)}, " + ("growing" if session.config.growing_layers else "constant")
    parts = [f"position {session.position:,}", state]
    parts += [f"{speed:.1f} tokens/s"] if speed else []
    parts += [stopped] if stopped else []
    console.print(f"[dim]{' · '.join(parts)}[/]\n", soft_wrap=True)


class SessionFile:
    """The file a conversation is saved in, as this program knows it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = self._version()

    def _version(self) -> tuple[int, int] | None:
        found = self.path.stat() if self.path.exists() else None
        return None if found is None else (found.st_ino, found.st_mtime_ns)

    def save(self, session: Session) -> None:
        """Save, unless another program has written the file since. Raises SessionError or OSError."""
        from bmojo_edge.session import SessionError

        if self._version() not in (None, self._known):
            raise SessionError(f"{self.path} was written by another program; /save FILE keeps this one elsewhere")
        session.save(self.path)
        self._known = self._version()


class Conversation:
    """A session, the file it is saved in, and those it was forked from.

    `begin` makes a fresh session; with `transcript`, what is said is also appended to a text file beside the file.
    """

    def __init__(
        self,
        begin: Callable[[], Session],
        sampling: Options,
        session: Session,
        file: SessionFile | None,
        transcript: bool,
    ) -> None:
        self._begin, self._sampling, self._transcript = begin, sampling, transcript
        self._session, self._file = session, file
        self._put_aside: list[tuple[Session, SessionFile | None]] = []
        self._interrupted = False  # whether the last thing that happened was Ctrl-C
        self._doing: dict[str, Callable[[str], None]] = {
            "/help": self._help, "/rewind": self._rewind, "/regenerate": self._regenerate, "/edit": self._edit,
            "/fork": self._fork, "/back": self._back, "/save": self._save_as, "/open": self._open,
            "/memory": self._memory, "/reset": self._reset,
        }  # fmt: skip

    def run(self) -> None:
        """Read lines until the end."""
        if sys.stdin.isatty():
            _complete_commands()
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
            name, _, rest = text.partition(" ")
            return self._command(name, rest.strip())
        if text:
            self._stream(lambda: self._session.say(text, **self._sampling))
        return True

    def _stream(self, ask: Callable[[], Iterator[str]]) -> None:
        speed, stopped = None, ""
        try:
            seconds = answer(ask())
            turn = self._session.turns[-1]
            speed = (len(turn.answer_ids) - 1) / seconds if len(turn.answer_ids) > 1 and seconds else None
            if turn.finish_reason == "length":
                stopped = f"cut at {self._sampling.get('max_tokens')} tokens (--max-tokens)"
        except KeyboardInterrupt:
            write("\n")
            self._interrupted, stopped = True, "stopped"
        except ValueError as error:  # the template or the tokenizer refuses the text; the conversation stands
            say_error(str(error))
            return
        self._save()
        if self._transcript and self._file is not None:
            append_transcript(self._file.path, self._session)
        status(self._session, speed, stopped)

    def _save(self) -> None:
        if self._file is None:
            return
        try:
            self._file.save(self._session)
        except (OSError, ValueError) as error:
            say_error(f"not saved: {error}")

    def _command(self, name: str, rest: str) -> bool:
        """Do what a slash command says; whether the conversation goes on."""
        if name == "/exit":
            return False
        if name not in self._doing:
            say_error(f"{name}: no such command; /help lists them")
            return True
        try:
            self._doing[name](rest)
        except (OSError, ValueError) as error:
            say_error(f"{name} {error}")
        return True

    def _help(self, rest: str) -> None:
        width = max(map(len, COMMANDS)) + 2
        console.print(escape("\n".join(f"{name:<{width}}{what}" for name, what in COMMANDS.items())))

    def _rewind(self, rest: str) -> None:
        if rest and not rest.isdecimal():
            raise ValueError(f"takes a number of exchanges, got {rest!r}")
        self._session.rewind(int(rest or 1))
        self._save()
        status(self._session)

    def _regenerate(self, rest: str) -> None:
        self._stream(lambda: self._session.regenerate(**self._sampling))

    def _edit(self, rest: str) -> None:
        first, _, others = rest.partition(" ")
        turns, text = (int(first), others.strip()) if first.isdecimal() and others else (1, rest)
        if not text:
            raise ValueError("needs the text to say instead")
        self._stream(lambda: self._session.edit(text, turns, **self._sampling))

    def _fork(self, rest: str) -> None:
        file, fork = self._new_file(rest) if rest else None, self._session.fork()
        if file is not None:
            file.save(fork)
        self._put_aside.append((self._session, self._file))
        self._session, self._file = fork, file
        kept = f"saved in {escape(rest)}" if rest else "not saved; /save FILE keeps it"
        console.print(f"[dim]A copy, {kept}. /back returns to the conversation as it was here.[/]")

    def _back(self, rest: str) -> None:
        if not self._put_aside:
            raise ValueError("leads nowhere: this conversation is no copy")
        self._session, self._file = self._put_aside.pop()
        status(self._session)

    def _save_as(self, rest: str) -> None:
        if not rest:
            raise ValueError("needs the name of a file")
        file = self._new_file(rest)
        file.save(self._session)
        self._file = file
        console.print(f"[dim]Saved in {escape(rest)}.[/]")

    def _new_file(self, name: str) -> SessionFile:
        """A file that is not there yet, so that no other conversation is written over."""
        if Path(name).exists() and Path(name).stat().st_size:
            raise ValueError(f"{name}: exists; choose another name, or go on with it by /open")
        return SessionFile(Path(name))

    def _open(self, rest: str) -> None:
        from bmojo_edge.session import Session
        from bmojo_edge.session_file import origin

        if not rest:
            raise ValueError("needs the name of a file")
        self._session = Session.open(rest, self._session.lm)
        self._file, self._put_aside = SessionFile(Path(rest)), []
        resumed(self._session, origin(Path(rest)))

    def _memory(self, rest: str) -> None:
        from bmojo_edge.cli.inspect import print_inspection
        from bmojo_edge.inspection import inspect

        print_inspection(inspect(self._session), console)

    def _reset(self, rest: str) -> None:
        if self._file is not None:
            console.print(f"[dim]{escape(str(self._file.path))} stays as it is; /save FILE keeps what comes now.[/]")
        self._session, self._file = self._begin(), None
        status(self._session)


def append_transcript(path: Path, session: Session) -> None:
    """Append the last exchange to FILE.jsonl, a line of JSON; a line that a kill cut off stays a line of its own."""
    turn = session.turns[-1]
    line = {"position": session.position, "user": turn.user, "answer": turn.answer}
    try:
        with Path(f"{path}.jsonl").open("a+b") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n":
                file.write(b"\n")
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        say_error(f"no transcript: {error}")


def resumed(session: Session, made: Origin) -> None:
    """Where a saved conversation goes on, on stderr, and whether it does so with another store."""
    last = session.turns[-1].user if session.turns else ""
    said = f", after {escape(repr(last if len(last) < 60 else last[:57] + '...'))}" if last else ""
    console.print(f"[dim]resumed at position {session.position:,}{said}[/]", soft_wrap=True)
    store = getattr(session.lm, "store", None)
    if store is not None and made.store_id not in (None, store.id):
        here = escape(str(store.folder))
        console.print(
            f"[dim]goes on with storage in {here}, without what is in {escape(str(made.store))}[/]", soft_wrap=True
        )


def _complete_commands() -> None:
    """Editing and history for input(); Tab completes commands and names of files after them."""
    import glob
    import readline

    names = sorted({command.partition(" ")[0] for command in COMMANDS})

    def complete(text: str, state: int) -> str | None:
        line = readline.get_line_buffer()
        found = (
            [name for name in names if name.startswith(text)] if line == text else glob.glob(glob.escape(text) + "*")
        )
        return [*found, None][state] if state <= len(found) else None

    readline.set_completer_delims(" \t\n")  # a slash is part of a command and of a file's name
    readline.set_completer(complete)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")


def _prompt() -> str:
    """What stands before a question; readline must be told which characters take no room."""
    return "\001\033[1;36m\002› \001\033[0m\002" if console.is_terminal and not console.no_color else "› "
