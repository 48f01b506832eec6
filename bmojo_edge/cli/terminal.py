"""Writing to the terminal: answers go to stdout, everything about them to stderr."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal

console = Console(stderr=True, highlight=False)

# A model may say anything: on a terminal, control characters but newline and tab are left out.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_STAGES = {
    "download": "Downloading",
    "weights": "Converting weights",
    "golden": "Checking against the source",
    "vocabulary": "Learning the vocabulary",
    "tokens": "Cutting into tokens",
    "decode": "Exporting the step of a token",
    "prefill": "Exporting the step of a chunk",
    "commit": "Exporting the eidetic choice",
    "package": "Joining the functions",
    "check": "Running what was exported",
}


def write(text: str) -> None:
    """Write part of an answer at once."""
    sys.stdout.write(_CONTROL.sub("", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def read_stdin() -> str:
    """All of stdin, without the newline that ends its last line. Raises PromptError where it is not text."""
    from bmojo_edge.generate import PromptError

    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"stdin: is not UTF-8 text at byte {error.start}") from None


def size(nbytes: int) -> str:
    """Bytes for people, such as "47.2 MB"."""
    return decimal(nbytes)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr; yields the function that `convert` reports to: (stage, done, total)."""
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(_STAGES.get(stage, stage))
            bar.update(tasks[stage], completed=done, total=total)

        yield report
