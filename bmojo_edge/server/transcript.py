"""The words of a conversation as lines of JSON that are only ever appended, and what they add up to.

A line is an event: begin, turn, rewind, title, state. The transcript is what a conversation is; its state can be
computed from it. This module knows texts and numbers; it knows nothing of states, models or HTTP.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

TITLE = 60  # characters of the first question that are the title where none is given


@dataclass
class Told:
    """What a transcript adds up to: the turns that still stand, and the state they led to."""

    with_texts: bool = True
    created: float = 0.0
    updated: float = 0.0
    title: str | None = None  # as it was given
    first: str = ""  # question, its beginning
    system: str | None = None
    marks: list[tuple[int, str]] = field(default_factory=list)  # after each turn: position, hash of the state's ids
    exchanges: list[tuple[str, str]] = field(default_factory=list)  # questions and answers; empty without texts

    def take(self, event: dict[str, Any]) -> None:
        """One more event. Raises KeyError, TypeError or ValueError where it is none."""
        kind, at = event["event"], float(event["at"])
        if kind == "begin":
            self.created, self.title = at, event["title"]
        elif kind == "title":
            self.title = event["title"]
        elif kind == "turn":
            mark, user, answer = (int(event["position"]), str(event["hash"])), str(event["user"]), str(event["answer"])
            if not self.marks:
                self.system, self.first = event["system"], " ".join(user.split())[:TITLE]
            self.marks.append(mark)
            self.exchanges += [(user, answer)] if self.with_texts else []
        elif kind == "rewind":
            left = len(self.marks) - int(event["turns"])
            del self.marks[left:], self.exchanges[left:]
        elif kind == "state":
            self.marks[-1] = int(event["position"]), str(event["hash"])
        else:
            raise ValueError(f"no event is called {kind!r}")
        self.updated = at

    @property
    def shown_title(self) -> str:
        """The title, or what the first question begins with."""
        return (self.first if self.marks else "") if self.title is None else self.title

    @property
    def position(self) -> int:
        """Tokens read and said."""
        return self.marks[-1][0] if self.marks else 0

    @property
    def hash(self) -> str:
        """Of the ids behind the state after the last turn; "" before the first."""
        return self.marks[-1][1] if self.marks else ""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages."""
        messages = [] if self.system is None or not self.marks else [{"role": "system", "content": self.system}]
        for user, answer in self.exchanges:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        return messages


class Transcript:
    """Events in a file, or in memory alone where there is no path."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._unwritten: list[bytes] = []  # without a path, all of them
        self._lock = threading.Lock()

    def append(self, event: dict[str, Any]) -> None:
        """Append an event. Raises OSError; what could not be written is written with the next one."""
        with self._lock:
            self._unwritten.append(json.dumps(event).encode())  # ASCII: no text fails to be written
            if self._path is not None:
                self._write(self._path)

    def _write(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with os.fdopen(os.open(path, flags, 0o600), "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            cut = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"  # by a kill or a full disk
            while self._unwritten:
                raw = (b"\n" if cut else b"") + self._unwritten[0] + b"\n"
                cut = False
                while raw:
                    raw = raw[os.write(file.fileno(), raw) :]
                del self._unwritten[0]

    def told(self, with_texts: bool = True) -> Told:
        """What all events add up to; a line that is no event, as a kill may leave one, is passed over and logged."""
        told = Told(with_texts)
        for number, line in enumerate(self._lines(), start=1):
            try:
                told.take(json.loads(line))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                logger.warning("%s: line %d is passed over: %r", self._path, number, error)
        return told

    def _lines(self) -> list[bytes]:
        with self._lock:
            written = []
            if self._path is not None and self._path.is_file() and not self._path.is_symlink():
                with os.fdopen(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                    written = file.readlines()
            return written + self._unwritten
