"""Where sessions are on the disk: for each id a transcript (`.jsonl`) and a session file (`.bmojo`), and nothing else.

This module knows files; it knows nothing of what sessions do.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from bmojo_edge import session_file
from bmojo_edge.server.transcript import Transcript
from bmojo_edge.session_file import SavedSession

logger = logging.getLogger(__name__)

ID = r"^[A-Za-z0-9_-]{1,64}$"
LOCK = "lock"


class SessionFolder:
    """A folder of sessions, for one process at a time. Raises OSError where it cannot be used."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = path
        self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            message = f"{path}: another server keeps its sessions there; give this one --sessions-dir, or --no-save"
            raise OSError(message) from None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="bmojo-edge sessions")

    def ids(self) -> list[str]:
        """The sessions there are."""
        names = (path.stem for path in self._path.glob("*.jsonl") if not path.is_symlink())
        return [found for name in names if re.fullmatch(ID, found := _id(name)) and _stem(found) == name]

    def transcript(self, name: str) -> Transcript:
        """The transcript of a session."""
        return Transcript(self._file(name, ".jsonl"))

    def save(self, name: str, session: SavedSession) -> Future[None]:
        """Write the state of a session in another thread; one after another, whole or not at all."""
        return self._writer.submit(self._write, self._file(name, ".bmojo"), session)

    def state(self, name: str) -> Path | None:
        """The file with the state of a session, if there is one."""
        path = self._file(name, ".bmojo")
        return path if path.is_file() and not path.is_symlink() else None

    def delete(self, name: str) -> None:
        """Remove a session; its words go first."""
        self._file(name, ".jsonl").unlink(missing_ok=True)
        self._writer.submit(self._file(name, ".bmojo").unlink, missing_ok=True)  # after what is being written

    def close(self) -> None:
        """Wait until all is written, and let other processes have the folder."""
        self._writer.shutdown(wait=True)
        os.close(self._lock)

    def _write(self, path: Path, session: SavedSession) -> None:
        if path.is_symlink():  # would lead out of the folder
            path.unlink()
        try:
            session_file.write(path, session)
        except session_file.SessionError:  # what is there is damaged: nothing of it can be used
            path.unlink()
            session_file.write(path, session)

    def _file(self, name: str, suffix: str) -> Path:
        if re.fullmatch(ID, name) is None:
            raise ValueError(f"id: must be 1 to 64 of A-Z, a-z, 0-9, _ and -, got {name!r}")
        return self._path / (_stem(name) + suffix)


def _stem(name: str) -> str:
    """The name of a session's files; capitals are marked, as some file systems take them for small letters."""
    return re.sub("[A-Z]", lambda found: f"~{found[0].lower()}", name)


def _id(stem: str) -> str:
    return re.sub("~([a-z])", lambda found: found[1].upper(), stem)
