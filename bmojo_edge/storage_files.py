"""The files of a store: fixed slots of quantised keys and values, their summaries, and a table that says what is whole.

Knows bytes and checksums, not what they mean (docs/storage.md has the format). A slot's entry is written last and
carries a CRC-32 of itself and of the slot's content, so a process killed at any moment leaves slots that are whole or
empty. One process at a time has a store open.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bmojo_edge.staging import staged_file

FORMAT, VERSION = "bmojo-edge store", 1
BLOCKS, SUMMARIES, ENTRIES, SOURCES, HEAD, LOCK = (
    "blocks.bin", "summaries.bin", "entries.bin", "sources.jsonl", "store.json", "lock",
)  # fmt: skip


class StoreError(ValueError):
    """A store is missing, damaged, in use, full or of another model; the message says which and what to do."""


class Shape(NamedTuple):
    """The sizes of everything a store holds of one block of tokens."""

    block: int  # tokens of a block
    layers: tuple[int, ...]  # layers whose keys and values are kept
    router: int  # the layer by whose queries and keys blocks are chosen
    pool: int  # neighbouring keys of the router whose mean is one summary vector
    kv_heads: int
    head_dim: int

    @property
    def summaries(self) -> int:
        """Summary vectors of a block and head."""
        return self.block // self.pool

    @property
    def scales_bytes(self) -> int:
        """Bytes of the float16 scales of a block, one for each layer, keys or values, head and token."""
        return 2 * len(self.layers) * 2 * self.kv_heads * self.block

    @property
    def payload_bytes(self) -> int:
        """Bytes of a block's keys and values."""
        return self.scales_bytes + len(self.layers) * 2 * self.kv_heads * self.block * self.head_dim

    @property
    def summary_bytes(self) -> int:
        """Bytes of a block's summary."""
        return 2 * self.summaries * self.kv_heads * self.head_dim

    @property
    def entry(self) -> np.dtype[Any]:
        """A block's line in the table."""
        return np.dtype(
            [
                ("id", "<u8"), ("branch", "<i8"), ("start", "<i8"), ("tokens", "<i4"), ("ids", "<i4", (self.block,)),
                ("payload", "<u4"), ("summary", "<u4"), ("crc", "<u4"),
            ]
        )  # fmt: skip


def quantised(block: np.ndarray) -> bytes:
    """Keys and values (layers, 2, g, block, p) in 8 bits: symmetric, one scale for every token and head."""
    values = np.array(block, np.float32)  # a copy, then changed in place: fresh memory is what costs here
    scales = (np.maximum(values.max(-1), -values.min(-1)) / 127).astype(np.float16)
    inverse = np.divide(1, scales, out=np.zeros(scales.shape, np.float32), where=scales > 0)
    np.multiply(values, inverse[..., None], out=values)
    np.rint(values, out=values)
    np.clip(values, -127, 127, out=values)
    return scales.tobytes() + values.astype(np.int8).tobytes()


def dequantised(payload: bytes, shape: Shape) -> np.ndarray:
    """(layers, 2, g, block, p) float16."""
    size = (len(shape.layers), 2, shape.kv_heads, shape.block)
    scales = np.frombuffer(payload, np.float16, count=shape.scales_bytes // 2).reshape(size)
    values = np.frombuffer(payload, np.int8, offset=shape.scales_bytes).reshape(*size, shape.head_dim)
    return (values.astype(np.float32) * scales[..., None].astype(np.float32)).astype(np.float16)


class Files:
    """The open files of a store's folder, locked against other processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = _locked(folder)
        try:
            self.head = _read_head(folder / HEAD)
            self.shape = Shape(**{**self.head["shape"], "layers": tuple(self.head["shape"]["layers"])})
            flags = os.O_RDWR | os.O_CREAT
            self._blocks, self._summaries, self._entries, self._sources = (
                os.open(folder / name, flags, 0o644) for name in (BLOCKS, SUMMARIES, ENTRIES, SOURCES)
            )
        except BaseException:
            os.close(self._lock)
            raise

    @staticmethod
    def create(folder: Path, shape: Shape, capacity: int, identity: dict[str, Any]) -> None:
        """Make the folder of an empty store of at most `capacity` blocks."""
        folder.mkdir(parents=True, exist_ok=True)
        head = {"format": FORMAT, "version": VERSION, "shape": shape._asdict(), "capacity": capacity, "model": identity}
        with staged_file(folder / HEAD) as file:
            file.write(json.dumps(head, ensure_ascii=False).encode())

    # --- the table

    def entries(self) -> tuple[np.ndarray, int]:
        """All entries, those damaged or never finished with id 0, and how many bytes were neither."""
        size = os.fstat(self._entries).st_size
        kind = self.shape.entry
        raw = os.pread(self._entries, size - size % kind.itemsize, 0)
        found = np.frombuffer(raw, kind).copy()
        damaged = 0
        for i in np.flatnonzero(found["id"]):
            if _entry_crc(found[i]) != found[i]["crc"]:
                found[i], damaged = np.zeros((), kind), damaged + 1
        return found, damaged

    def write_entry(self, slot: int, entry: np.ndarray) -> None:
        """Write a slot's entry, its checksum filled in; an entry of zeros empties the slot."""
        if entry["id"]:
            entry["crc"] = _entry_crc(entry)
        _pwrite(self._entries, entry.tobytes(), slot * self.shape.entry.itemsize)

    # --- slots

    def write_payload(self, slot: int, payload: bytes) -> int:
        """Write a block's keys and values; their CRC-32."""
        _pwrite(self._blocks, payload, slot * self.shape.payload_bytes)
        return zlib.crc32(payload)

    def read_payload(self, slot: int, crc: int) -> bytes:
        """A block's keys and values. Raises StoreError where they are not what was written."""
        payload = os.pread(self._blocks, self.shape.payload_bytes, slot * self.shape.payload_bytes)
        if zlib.crc32(payload) != crc:
            raise StoreError(f"{self.folder / BLOCKS}: block in slot {slot} is damaged; {_repair(self.folder)}")
        return payload

    def write_summary(self, slot: int, summary: np.ndarray) -> int:
        """Write a block's summary (summaries, g, p) float16; its CRC-32."""
        raw = summary.tobytes()
        _pwrite(self._summaries, raw, slot * self.shape.summary_bytes)
        return zlib.crc32(raw)

    def read_summaries(self, slots: np.ndarray) -> np.ndarray:
        """Summaries (n, summaries, g, p) float16 of slots (n,), neighbours read together."""
        size, shape = self.shape.summary_bytes, self.shape
        out = np.empty((len(slots), shape.summaries, shape.kv_heads, shape.head_dim), np.float16)
        cuts = np.flatnonzero(np.diff(slots) != 1) + 1
        for begin, end in zip([0, *cuts], [*cuts, len(slots)], strict=True):
            if begin < end:
                view = out[begin:end].data.cast("B")
                if os.preadv(self._summaries, [view], int(slots[begin]) * size) != len(view):
                    raise StoreError(f"{self.folder / SUMMARIES}: is cut short; {_repair(self.folder)}")
        return out

    # --- sources

    def read_sources(self) -> list[dict[str, Any]]:
        """The lines of the log; one that a killed process did not finish is cut off."""
        raw = os.pread(self._sources, os.fstat(self._sources).st_size, 0)
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.ftruncate(self._sources, len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise StoreError(f"{self.folder / SOURCES}: is damaged ({error})") from None

    def log(self, line: dict[str, Any]) -> None:
        """Append to the log of sources."""
        raw = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        _pwrite(self._sources, raw, os.fstat(self._sources).st_size)

    # --- the end

    def sync(self) -> None:
        """Return once everything written so far is on the disk."""
        for descriptor in (self._blocks, self._summaries, self._entries, self._sources):
            os.fsync(descriptor)

    def close(self) -> None:
        """Close the files and let other processes in."""
        for descriptor in (self._blocks, self._summaries, self._entries, self._sources, self._lock):
            os.close(descriptor)

    def nbytes(self) -> int:
        """Bytes on the disk, indexes included."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())


def _entry_crc(entry: np.ndarray) -> int:
    return zlib.crc32(entry.tobytes()[: -entry.dtype["crc"].itemsize])


def _pwrite(descriptor: int, raw: bytes, offset: int) -> None:
    while raw:
        written = os.pwrite(descriptor, raw, offset)
        raw, offset = raw[written:], offset + written


def _repair(folder: Path) -> str:
    return f"`bmojo-edge memory verify {folder}` tells how much is, `memory compact` leaves it out"


def _read_head(path: Path) -> dict[str, Any]:
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path.parent}: is not a store: {HEAD} is missing") from None
    except ValueError as error:
        raise StoreError(f"{path}: is damaged ({error})") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise StoreError(f"{path}: is not a store's")
    if head.get("version") != VERSION:
        raise StoreError(f"{path}: version: is {head.get('version')}, this program reads {VERSION}")
    return head


def _locked(folder: Path) -> int:
    """The lock of a store as an open descriptor; the kernel frees it when its process ends, however that ends."""
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such store")
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.pread(descriptor, 32, 0).decode(errors="replace")
        os.close(descriptor)
        raise StoreError(f"{folder}: is in use by another process ({owner or 'unknown'}); wait or end it") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()}".encode(), 0)
    return descriptor
