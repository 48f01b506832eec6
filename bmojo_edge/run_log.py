"""log.jsonl of a training run: one JSON object a line, the source of truth of what happened.

Lines with a `step` tell of that step (from 1); the first line of every start has `event`. Knows no engine.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

FILE = "log.jsonl"

Record = dict[str, Any]


class RunLogError(ValueError):
    """A run's log is missing or damaged; the message names file and line."""


def read(run: str | Path) -> list[Record]:
    """All records of a run, given its folder or its log; a last line that was cut off is left out."""
    path = Path(run)
    path = path / FILE if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise RunLogError(f"{path}: no such file, so this is no training run") from None
    records, last = [], lines.pop()  # what follows the last newline was cut off
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            raise RunLogError(f"{path}: line {number} is not a JSON object")
        records.append(record)
    if last and not records:
        raise RunLogError(f"{path}: holds no whole line")
    return records


def losses(records: list[Record], upto: int) -> list[float]:
    """The training losses of steps up to `upto`, in their order."""
    return [record["loss"] for record in records if record.get("loss") is not None and record.get("step", 0) <= upto]


class RunLog:
    """The log as it is written. With `upto`, records of later steps are dropped first: those steps run again."""

    def __init__(self, run: Path, upto: int | None = None) -> None:
        path = run / FILE
        if upto is not None and path.is_file():
            kept = [record for record in read(path) if record.get("step", 0) <= upto]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(map(_line, kept)), encoding="utf-8")
            os.replace(partial, path)
        self._file: TextIO = path.open("w" if upto is None else "a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append a record; it outlives this process at once."""
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        """Flush to the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def _line(record: Record) -> str:
    """One line of strict JSON: what is not finite becomes null."""
    clean = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}
    return json.dumps(clean, allow_nan=False) + "\n"
