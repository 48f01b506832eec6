"""Results on disk and who works on what: processes that fill several GPUs share it, one at a time."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from apps import report
from apps.repro.cells import Cell, Row


def _name(fields: Row) -> str:
    return json.dumps(fields, sort_keys=True)


class Ledger:
    """A file of rows a task, rewritten whole after each row; cells in the works are lines of the file `claims`."""

    def __init__(self, folder: Path, claims: Path) -> None:
        self.folder, self.claims = folder, claims
        self.rows()

    @contextmanager
    def _alone(self) -> Iterator[IO[str]]:
        with self.claims.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _of(self, path: Path) -> list[Row]:
        try:
            return json.loads(path.read_text(encoding="utf-8"))["rows"]
        except (ValueError, KeyError) as error:
            raise SystemExit(f"{path}: is not a results file ({error}); move it away to start anew") from None

    def rows(self) -> list[Row]:
        """Rows of every task."""
        return [row for path in sorted(self.folder.glob("*.json")) for row in self._of(path)]

    def claim(self, planned: Callable[[list[Row]], Iterable[Cell]]) -> Cell | None:
        """The first cell of the plan, made from the rows there are, that has no row and that nobody works on."""
        with self._alone() as file:
            file.seek(0)
            taken, rows = set(file.read().splitlines()), self.rows()
            for cell in missing(planned(rows), rows):
                name = _name(cell.key())
                if name not in taken:
                    file.write(name + "\n")
                    return cell
        return None

    def add(self, row: Row) -> None:
        """Keep a row, whatever happens next."""
        with self._alone():
            path = self.folder / f"{row['task']}.json"
            rows = [*(self._of(path) if path.exists() else []), row]
            report.write(path, rows, ("torch", "triton", "numpy"))


def missing(cells: Iterable[Cell], rows: Iterable[Row]) -> list[Cell]:
    """Cells without a row, each once."""
    names = Cell.__dataclass_fields__
    have = {_name({name: row.get(name) for name in names}) for row in rows}
    return [cell for cell in dict.fromkeys(cells) if _name(cell.key()) not in have]
