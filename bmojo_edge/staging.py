"""Folders and files that appear whole or not at all: written under a temporary name beside the target, then renamed.

Knows the file system and nothing of what they hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def _siblings(target: Path, kind: str) -> list[Path]:
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"))


def backup_of(target: Path) -> Path | None:
    """Where the former content of `target` lies, if a replacement was cut off between its two renames."""
    return next(iter(_siblings(target, "old")), None) if not target.exists() else None


def _lock(folder: Path) -> int | None:
    """A lock on a folder as an open descriptor, None where another process holds it; the kernel frees it if we die."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _recover(target: Path) -> None:
    """Undo what processes that were killed left: put a backup back, remove unfinished folders."""
    backup = backup_of(target)
    if backup is not None:
        backup.rename(target)
    for stale in [*_siblings(target, "tmp"), *_siblings(target, "old")]:
        descriptor = _lock(stale)
        if descriptor is not None:
            shutil.rmtree(stale, ignore_errors=True)
            os.close(descriptor)


@contextlib.contextmanager
def staged(target: Path, check_replaceable: Callable[[Path], None]) -> Iterator[Path]:
    """A new folder that takes the name `target` when the block ends without an exception, and is removed otherwise.

    `check_replaceable(target)` is called where `target` exists, at the start and before it is replaced, and raises to
    refuse. A folder that is replaced keeps existing, under one name or the other, until the new one is in its place.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)
    if target.exists():
        check_replaceable(target)
    token = f"{os.getpid()}-{secrets.token_hex(4)}"
    folder = target.with_name(f".{target.name}.tmp-{token}")
    folder.mkdir()
    descriptor = _lock(folder)
    try:
        yield folder
        if target.exists():
            check_replaceable(target)
            _swap(folder, target, target.with_name(f".{target.name}.old-{token}"))
        else:
            folder.rename(target)
        _flush(target.parent)
    except OSError as error:
        _name(error, target)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _swap(folder: Path, target: Path, backup: Path) -> None:
    target.rename(backup)
    try:
        folder.rename(target)
    except BaseException:
        backup.rename(target)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _name(error: OSError, target: Path) -> None:
    """Let an error say what was being written; that of a full disk names nothing."""
    if error.errno is not None and error.filename is None:
        error.filename = str(target)


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name `target`, on the disk, when the block ends without an exception.

    Until then `target` is what it was, and it never is anything in between. What killed processes left is removed.
    """
    target = Path(os.path.realpath(target))
    for stale in _siblings(target, "tmp"):
        descriptor = _lock(stale)
        if descriptor is not None:
            stale.unlink(missing_ok=True)
            os.close(descriptor)
    path = target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with path.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(path, target)
            _flush(target.parent)
    except OSError as error:  # closing the file, too, may write to a full disk
        _name(error, target)
        raise
    finally:
        path.unlink(missing_ok=True)
