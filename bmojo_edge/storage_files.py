"""The files of a store: fixed slots of quantised keys and values, their summaries, and a table that says what is whole.

Knows bytes and checksums, not what they mean (docs/storage.md has the format). A slot's entry is written last and
carries a CRC-32 of itself and of the slot's content, so a process killed at any moment leaves slots that are whole or
empty. One process at a time has a store open.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from bmojo_edge.staging import backup_of, staged_file
from bmojo_edge.storage_blocks import Blocks, Shape
from bmojo_edge.tensors import raw_bytes

FORMAT, VERSION = "bmojo-edge store", 3
BLOCKS, SUMMARIES, ENTRIES, SOURCES, HEAD, LOCK = (
    "blocks.bin", "summaries.bin", "entries.bin", "sources.jsonl", "store.json", "lock",
)  # fmt: skip


class StoreError(ValueError):
    """A store is missing, damaged, in use, full or of another model; the message says which and what to do."""


class Files:
    """The open files of a store's folder, locked against other processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        read_head(folder)  # a folder that is no store is left as it is
        self._lock = _locked(folder)
        try:
            self.head = read_head(folder)
            self.shape = _shape(self.head)
            flags = os.O_RDWR | os.O_CREAT
            self._blocks, self._summaries, self._entries, self._sources = (
                os.open(folder / name, flags, 0o644) for name in (BLOCKS, SUMMARIES, ENTRIES, SOURCES)
            )
        except BaseException:
            os.close(self._lock)
            raise

    @staticmethod
    def create(folder: Path, shape: Shape, capacity: int, model: dict[str, Any], name: str | None = None) -> None:
        """Make the folder of an empty store of at most `capacity` blocks; name: its id, a new one where None."""
        folder.mkdir(parents=True, exist_ok=True)
        head = {
            "format": FORMAT, "version": VERSION, "id": name or secrets.token_hex(8), "shape": shape._asdict(),
            "capacity": capacity, "model": model,
        }  # fmt: skip
        with staged_file(folder / HEAD) as file:
            file.write(_line(head))

    # --- the table

    def entries(self) -> tuple[np.ndarray, int]:
        """All entries, those damaged or never finished with id 0, and how many are damaged or missing."""
        size = os.fstat(self._entries).st_size
        kind = self.shape.entry
        raw = os.pread(self._entries, size - size % kind.itemsize, 0)
        found = np.frombuffer(raw, kind).copy()
        damaged = 0
        for i in np.flatnonzero(np.frombuffer(raw, np.uint8).reshape(-1, kind.itemsize).any(1)):
            if _entry_crc(found[i]) != found[i]["crc"]:
                found[i], damaged = np.zeros((), kind), damaged + 1
        slots = -(-os.fstat(self._blocks).st_size // self.shape.payload_bytes)
        return found, damaged + max(0, slots - len(found))  # a slot has had an entry since before it had content

    def empty(self, slot: int) -> None:
        """Mark a slot empty."""
        _pwrite(self._entries, bytes(self.shape.entry.itemsize), slot * self.shape.entry.itemsize)

    # --- slots

    def write(self, slot: int, entries: np.ndarray, blocks: Blocks) -> None:
        """Write n blocks to the slots from `slot` on: empty entries first, then the content, then entries (n,).

        Their checksums are filled in.
        """
        n, shape = len(entries), self.shape
        _pwrite(self._entries, bytes(n * shape.entry.itemsize), slot * shape.entry.itemsize)
        for i, (payload, summary) in enumerate(zip(*blocks, strict=True)):
            entries["payload"][i], entries["summary"][i] = zlib.crc32(payload), zlib.crc32(summary)
        _pwrite(self._blocks, raw_bytes(blocks.payloads), slot * shape.payload_bytes)
        _pwrite(self._summaries, raw_bytes(blocks.summaries), slot * shape.summary_bytes)
        for entry in entries:
            entry["crc"] = _entry_crc(entry)
        _pwrite(self._entries, raw_bytes(entries), slot * shape.entry.itemsize)

    def read_payload(self, slot: int, crc: int, into: np.ndarray | None = None) -> np.ndarray:
        """A block's keys and values as bytes, in an array given or new.

        Raises StoreError where they are not what was written.
        """
        payload = np.empty(self.shape.payload_bytes, np.uint8) if into is None else into
        read = os.preadv(self._blocks, [payload.data], slot * self.shape.payload_bytes)
        if read != len(payload) or zlib.crc32(raw_bytes(payload)) != crc:
            raise StoreError(f"{self.folder / BLOCKS}: block in slot {slot} is damaged; {_repair(self.folder)}")
        return payload

    def read_summary(self, slot: int) -> np.ndarray:
        """The summary (summaries, g, p) float16 of a slot."""
        shape = self.shape
        found = np.empty((1, shape.summaries, shape.kv_heads, shape.head_dim), np.float16)
        self.read_summaries(np.array([slot]), np.zeros(1, np.int64), found)
        return found[0]

    def read_summaries(self, slots: np.ndarray, places: np.ndarray, into: np.ndarray) -> None:
        """Read the summaries of those of slots (n,) at `places`, ascending, into (n, summaries, g, p) float16.

        Neighbours are read together.
        """
        size = self.shape.summary_bytes
        cuts = np.flatnonzero((np.diff(slots[places]) != 1) | (np.diff(places) != 1)) + 1
        for run in np.split(places, cuts):
            if len(run):
                view = into[run[0] : run[-1] + 1].data.cast("B")
                if os.preadv(self._summaries, [view], int(slots[run[0]]) * size) != len(view):
                    raise StoreError(f"{self.folder / SUMMARIES}: is cut short; {_repair(self.folder)}")

    # --- sources

    def read_sources(self) -> tuple[list[dict[str, Any]], int]:
        """The lines of the log, and how many are damaged; one that a killed process did not finish is cut off."""
        raw = os.pread(self._sources, os.fstat(self._sources).st_size, 0)
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.ftruncate(self._sources, len(whole))
        lines = [_unchanged(line) for line in whole.split(b"\n")[:-1]]
        return [line for line in lines if line is not None], lines.count(None)

    def log(self, line: dict[str, Any]) -> None:
        """Append to the log of sources. Raises StoreError where it cannot be written, and leaves no part of it."""
        end = os.fstat(self._sources).st_size
        try:
            _pwrite(self._sources, _line(line) + b"\n", end)
        except OSError as error:
            os.ftruncate(self._sources, end)
            raise StoreError(f"{self.folder / SOURCES}: writing failed: {error}") from error

    # --- the end

    def sync(self) -> None:
        """Return once everything written so far is on the disk."""
        for descriptor in (self._blocks, self._summaries, self._entries, self._sources):
            os.fsync(descriptor)

    def close(self) -> None:
        """Close the files and let other processes in."""
        for descriptor in (self._blocks, self._summaries, self._entries, self._sources, self._lock):
            os.close(descriptor)
        self._blocks = self._summaries = self._entries = self._sources = -1  # the numbers may be another file's soon

    def nbytes(self) -> int:
        """Bytes on the disk, indexes included."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())


def strangers(folder: Path) -> list[str]:
    """Names in a folder that are not a store's, nor what is left where making one was cut off."""
    own, begins = (BLOCKS, SUMMARIES, ENTRIES, SOURCES, HEAD, LOCK), ("index-", f".{HEAD}.tmp-")
    return sorted(p.name for p in folder.iterdir() if p.name not in own and not p.name.startswith(begins))


def is_store(folder: str | Path) -> bool:
    """Whether a folder is a store, or one that `Store.compacted` was replacing when it was killed."""
    return (Path(folder) / HEAD).is_file() or _replaced(folder) is not None


def _replaced(folder: str | Path) -> Path | None:
    """Where a store lies whose replacement was cut off."""
    backup = backup_of(Path(os.path.realpath(folder)))
    return backup if backup is not None and (backup / HEAD).is_file() else None


def _put_back(folder: Path) -> None:
    """Give such a store its name again."""
    if backup := _replaced(folder):
        lock = _locked(backup)  # else the one that replaces it is still there
        backup.rename(os.path.realpath(folder))
        os.close(lock)


def _line(facts: dict[str, Any]) -> bytes:
    """Facts as a line of JSON that tells whether it is as it was written."""
    crc = zlib.crc32(json.dumps(facts).encode())
    return json.dumps({**facts, "crc": crc}, ensure_ascii=False).encode()


def _unchanged(line: bytes) -> dict[str, Any] | None:
    """The facts of a line, None where it is not as it was written."""
    try:
        facts = json.loads(line)
        crc = facts.pop("crc")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return facts if crc == zlib.crc32(json.dumps(facts).encode()) else None


def _entry_crc(entry: np.ndarray) -> int:
    return zlib.crc32(entry.tobytes()[: -entry.dtype["crc"].itemsize])


def _pwrite(descriptor: int, raw: bytes | memoryview, offset: int) -> None:
    while raw:
        written = os.pwrite(descriptor, raw, offset)
        raw, offset = raw[written:], offset + written


def _repair(folder: Path) -> str:
    return f"`bmojo-edge memory verify {folder}` tells how much is, `memory compact` leaves it out"


def read_head(folder: Path) -> dict[str, Any]:
    """What `store.json` says. Raises StoreError where there is no store, or not one that is read here."""
    path = folder / HEAD
    _put_back(folder)
    try:
        raw = path.read_bytes()
        head = json.loads(raw)
    except (FileNotFoundError, NotADirectoryError):
        missing = f"is not a store: {HEAD} is missing" if folder.is_dir() else "no such store"
        raise StoreError(f"{folder}: {missing}") from None
    except ValueError as error:
        raise StoreError(f"{path}: is damaged ({error})") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise StoreError(f"{path}: is not a store's")
    if head.get("version") != VERSION:
        raise StoreError(f"{path}: version: is {head.get('version')}, this program reads {VERSION}")
    for field, kind in (("id", str), ("shape", dict), ("capacity", int), ("model", dict)):
        if not isinstance(head.get(field), kind):
            raise StoreError(f"{path}: is damaged: {field} is {head.get(field, 'missing')!r}")
    _shape(head)
    if _unchanged(raw) is None:
        raise StoreError(f"{path}: is damaged: not what was written; put a copy of it back")
    return head


def _shape(head: dict[str, Any]) -> Shape:
    try:
        return Shape(**{**head["shape"], "layers": tuple(head["shape"]["layers"])})
    except (TypeError, KeyError) as error:
        raise StoreError(f"{HEAD}: is damaged: shape is {head['shape']!r} ({error})") from None


def _locked(folder: Path) -> int:
    """The lock of a store as an open descriptor; the kernel frees it when its process ends, however that ends."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):  # replaced in the meantime
            raise BlockingIOError
    except OSError:
        owner = os.pread(descriptor, 32, 0).decode(errors="replace")
        os.close(descriptor)
        raise StoreError(f"{folder}: is in use by another process ({owner or 'unknown'}); wait or end it") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()}".encode(), 0)
    return descriptor
