"""Storage: blocks of tokens' keys and values on the disk, chosen by attention, within a budget (docs/storage.md).

A store holds texts and the tokens that conversations let go of, for one model. Blocks are numbered as they come; a
background writer quantises and writes them while they can already be chosen and read. NumPy; it knows nothing of
engines, states or when to look something up (recall.py).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from bmojo_edge.staging import staged
from bmojo_edge.storage_files import HEAD, Files, Shape, StoreError, dequantised, quantised
from bmojo_edge.storage_index import SCAN, Segments, block_scores, relevance

__all__ = ["Shape", "Source", "Store", "StoreError"]

DISK_BYTES, RAM_BYTES = 2**32, 2**28
SEGMENT = 8192
INDEX_BYTES = 3  # of an index, about, for every byte of the summaries in it


class Source(NamedTuple):
    """A text or a conversation in a store: a branch of tokens, which may continue another from a position on."""

    branch: int
    name: str
    kind: str  # "file" | "session"
    parent: int  # 0 = none
    at: int  # the position from which it leaves its parent
    added: str  # ISO 8601
    complete: bool
    blocks: int
    tokens: int


class _Waiting(NamedTuple):
    """A block that is not on the disk yet."""

    block: np.ndarray  # (layers, 2, g, block, p)
    summary: np.ndarray  # (summaries, g, p) float16


class Store:
    """An open store. Use it as a context manager, or `close` it.

    ram_bytes bounds what is kept in memory: blocks that wait to be written and blocks read lately, half of it each.
    identity: of the model that will use it; None leaves it unchecked. segment: blocks of one index (for tests).
    Raises StoreError naming the folder, and the field in which the model is another.
    """

    def __init__(
        self, folder: str | Path, identity: Mapping[str, Any] | None = None, ram_bytes: int = RAM_BYTES,
        segment: int = SEGMENT, writers: int = 1,
    ) -> None:  # fmt: skip
        self.folder = Path(folder)
        self._files = Files(self.folder)
        try:
            if identity is not None:
                self._check(identity)
            self.shape, self.capacity = self._files.shape, int(self._files.head["capacity"])
            self._read_table()
        except BaseException:
            self._files.close()
            raise
        s = self.shape
        self._segments = Segments(self.folder, segment, s.summaries, s.kv_heads, self._summaries_of)
        self._half = max(ram_bytes // 2, 2 * s.payload_bytes)
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._waiting: dict[int, _Waiting] = {}  # by slot
        self._changed = threading.Condition()
        self._failed: BaseException | None = None
        self._open = True
        self._writers = ThreadPoolExecutor(writers, thread_name_prefix="store")

    @classmethod
    def create(
        cls, folder: str | Path, shape: Shape, identity: Mapping[str, Any], disk_bytes: int = DISK_BYTES, **options: Any
    ) -> Self:
        """Make a store of at most `disk_bytes` on the disk, and open it; options are those of `Store`.

        Raises StoreError where the folder holds something already, or the budget is less than 16 blocks.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreError(f"{folder}: exists already")
        a_block = shape.payload_bytes + shape.entry.itemsize + (1 + INDEX_BYTES) * shape.summary_bytes
        capacity = disk_bytes // a_block
        if capacity < 16:
            raise StoreError(f"{folder}: disk_bytes: {disk_bytes:,} is less than 16 blocks of {a_block:,} bytes")
        Files.create(folder, shape, capacity, dict(identity))
        return cls(folder, identity, **options)

    def _check(self, identity: Mapping[str, Any]) -> None:
        theirs, ours = self._files.head["model"], dict(identity)
        hint = f"use the model it was made with{', ' + theirs['folder'] if theirs.get('folder') else ''}"
        for field in sorted({*theirs["config"], *ours["config"]}):
            there, here = theirs["config"].get(field), ours["config"].get(field)
            if there != here:
                raise StoreError(
                    f"{self.folder}: config.{field} is {there!r} in the store and {here!r} in this model; {hint}"
                )
        for part in ("tokenizer", "weights"):
            if theirs[part] != ours[part]:
                raise StoreError(f"{self.folder}: was made with a model of other {part.rstrip('s')}s; {hint}")

    def _read_table(self) -> None:
        entries, self._damaged = self._files.entries()
        size = max(len(entries), 64)
        self._ids, self._branches, self._starts = (np.zeros(size, np.int64) for _ in range(3))
        self._tokens = np.zeros(size, np.int32)
        self._crcs = np.zeros(size, np.uint32)
        self._sources: dict[int, dict[str, Any]] = {}
        for line in self._files.read_sources():
            self._sources.setdefault(int(line["branch"]), {}).update(line)
        gone = [branch for branch, source in self._sources.items() if source.get("removed")]
        live = (entries["id"] > 0) & ~np.isin(entries["branch"], gone)
        for column, name in (
            (self._ids, "id"), (self._branches, "branch"), (self._starts, "start"), (self._tokens, "tokens"),
            (self._crcs, "payload"),
        ):  # fmt: skip
            column[: len(entries)] = np.where(live, entries[name], 0)
        logged = max((source.get("next", 1) for source in self._sources.values()), default=1)
        self.next_id = max(int(self._ids.max(initial=0)) + 1, logged)  # no number is given twice

    # --- what it holds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Blocks."""
        return int((self._ids > 0).sum())

    @property
    def nbytes(self) -> int:
        """Bytes on the disk."""
        return self._files.nbytes()

    @property
    def sources(self) -> list[Source]:
        """What it holds, oldest first; conversations that continue another are sources of their own."""
        found = []
        for branch, source in sorted(self._sources.items()):
            if not source.get("removed"):
                mine = self._branches[self._ids > 0] == branch
                tokens = int(self._tokens[self._ids > 0][mine].sum())
                found.append(
                    Source(
                        branch, source["name"], source["kind"], source["parent"], source["at"], source["added"],
                        bool(source.get("complete")), int(mine.sum()), tokens,
                    )
                )  # fmt: skip
        return found

    # --- adding

    def begin(self, name: str, kind: str, parent: int = 0, at: int = 0) -> int:
        """A new source; its branch number, from 1."""
        branch = max(self._sources, default=0) + 1
        added = datetime.now(UTC).isoformat(timespec="seconds")
        self._log(branch, name=name, kind=kind, parent=parent, at=at, added=added)
        return branch

    def _log(self, branch: int, **facts: Any) -> None:
        line = {"branch": branch, **facts, "next": self.next_id}
        self._files.log(line)
        self._sources.setdefault(branch, {}).update(line)

    def complete(self, branch: int) -> None:
        """All of a source has been added and is on the disk."""
        self.flush()
        self._log(branch, complete=True)
        self._files.sync()

    def tip(self, branch: int) -> int:
        """The position after the last block of a branch; 0 where it has none, -1 where it was removed."""
        source = self._sources.get(branch, {"removed": True})
        if source.get("removed"):
            return -1
        if "tip" not in source:
            source["tip"] = int(self._ends()[self._branches == branch].max(initial=0))
        return source["tip"]

    def _source(self, branch: int) -> dict[str, Any]:
        if branch not in self._sources or self._sources[branch].get("removed"):
            raise StoreError(f"{self.folder}: has no source {branch}; it was removed, or the state is of another store")
        return self._sources[branch]

    def add(self, branch: int, start: int, ids: np.ndarray, kv: np.ndarray, tokens: int | None = None) -> None:
        """Add the blocks of a branch from position `start` on; they can be chosen and read at once.

        ids (n * block,); kv (layers, 2, g, n * block, p): unrotated keys, and values, of the shape's layers and, last,
        of its router where that is not among them. tokens: how many are real, all where None; what is not must be 0.
        Waits only where more blocks wait to be written than `ram_bytes` allows. Raises StoreError where writing failed.
        """
        self._raise_failure()
        s = self.shape
        n = len(ids) // s.block
        tokens = n * s.block if tokens is None else tokens
        router = s.layers.index(s.router) if s.router in s.layers else len(s.layers)
        keys = kv[router, 0].astype(np.float32).reshape(s.kv_heads, n, s.summaries, s.pool, s.head_dim)
        summaries = keys.mean(3).transpose(1, 2, 0, 3).astype(np.float16)  # (n, m, g, p)
        blocks = kv[: len(s.layers)].reshape(len(s.layers), 2, s.kv_heads, n, s.block, s.head_dim)
        for i in range(n):
            slot, begin = self._free_slot(), i * s.block
            entry = np.zeros((), s.entry)
            entry["id"], entry["branch"], entry["start"] = self.next_id, branch, start + begin
            entry["tokens"], entry["ids"] = min(s.block, tokens - begin), ids[begin : begin + s.block]
            self._ids[slot], self._branches[slot], self._starts[slot] = self.next_id, branch, start + begin
            self._tokens[slot] = entry["tokens"]
            block = _Waiting(blocks[:, :, :, i], summaries[i])
            with self._changed:
                self._changed.wait_for(lambda: len(self._waiting) * s.payload_bytes * 2 <= self._half)
                self._waiting[slot] = block
            self._writers.submit(self._write, slot, entry)
            self.next_id += 1
            if (self.next_id - 1) % self._segments.segment == 0:
                self._segments.prepare((self.next_id - 2) // self._segments.segment, self._live_ids())
        self._source(branch)["tip"] = start + tokens

    def _free_slot(self) -> int:
        """An empty slot, or that of the oldest block, which is forgotten."""
        free = np.flatnonzero(self._ids[: self.capacity] == 0)
        slot = int(free[0]) if len(free) else min(len(self._ids), self.capacity)
        if slot >= self.capacity:
            slot = int(self._ids[: self.capacity].argmin())
            self._forget(slot)
        elif slot == len(self._ids):
            for name in ("_ids", "_branches", "_starts", "_tokens", "_crcs"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        return slot

    def _forget(self, slot: int) -> None:
        """Let go of a slot's block in memory; on the disk it stays until something takes its place."""
        with self._changed:
            self._changed.wait_for(lambda: slot not in self._waiting)
        self._ids[slot] = 0
        self._cache.pop(slot, None)

    def _write(self, slot: int, entry: np.ndarray) -> None:
        """In the background: an empty entry, the content, then the entry that says it is whole."""
        try:
            waiting = self._waiting[slot]
            self._files.write_entry(slot, np.zeros((), self.shape.entry))
            entry["payload"] = self._files.write_payload(slot, quantised(waiting.block))
            entry["summary"] = self._files.write_summary(slot, waiting.summary)
            self._crcs[slot] = entry["payload"]
            self._files.write_entry(slot, entry)
        except BaseException as error:
            self._failed = error
        finally:
            with self._changed:
                self._waiting.pop(slot, None)
                self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failed is not None:
            raise StoreError(f"{self.folder}: writing failed: {self._failed}") from self._failed

    # --- choosing and reading

    def _ends(self) -> np.ndarray:
        return np.where(self._ids > 0, self._starts + self._tokens, 0)

    def _live_ids(self) -> np.ndarray:
        return np.sort(self._ids[self._ids > 0])

    def _slots_of(self, ids: np.ndarray) -> np.ndarray:
        order = self._ids.argsort(kind="stable")
        place = np.searchsorted(self._ids, ids, sorter=order).clip(max=len(order) - 1)
        slots = order[place]
        return slots[self._ids[slots] == ids]

    def _summaries_of(self, ids: np.ndarray) -> np.ndarray:
        return self._summaries(self._slots_of(ids))

    def _summaries(self, slots: np.ndarray) -> np.ndarray:
        """Summaries of slots (n,), of blocks on their way to the disk too."""
        with self._changed:
            waiting = {int(slot): self._waiting[slot].summary for slot in set(slots.tolist()) & self._waiting.keys()}
        out = np.empty((len(slots), self.shape.summaries, self.shape.kv_heads, self.shape.head_dim), np.float16)
        here = np.isin(slots, list(waiting))
        out[~here] = self._files.read_summaries(slots[~here])
        for i in np.flatnonzero(here):
            out[i] = waiting[int(slots[i])]
        return out

    def visible(self, horizon: int, branch: int, limit: int) -> np.ndarray:
        """Slots that a conversation may see: all blocks numbered below `horizon`, and its own up to a position.

        Its own are those of its branch, and of the branches that one continues up to where it left them.
        """
        live = self._ids > 0
        seen, ends = live & (self._ids < horizon), self._ends()
        for number in self.lineage(branch):
            seen |= live & (self._branches == number) & (ends <= limit)
            limit = min(limit, self._sources[number]["at"])
        return np.flatnonzero(seen)

    def lineage(self, branch: int) -> list[int]:
        """A branch, the one that it continues, and so on; what was removed ends it."""
        found = []
        while branch in self._sources and not self._sources[branch].get("removed"):
            found.append(branch)
            branch = self._sources[branch]["parent"]
        return found

    def choose(self, queries: np.ndarray, slots: np.ndarray, count: int) -> np.ndarray:
        """Of the blocks in `slots`, the at most `count` that queries (h, q, p), scaled, attend to most, best first.

        Ties go to the older block. Sealed segments name their candidates first; all others are looked at.
        """
        ids = self._ids[slots]
        sealed = self._segments.sealed(self.next_id)
        ordinals = self._segments.ordinal(ids)
        looked_at = ordinals >= sealed
        for ordinal in np.unique(ordinals[~looked_at]):
            named = self._segments.candidates(int(ordinal), queries, self._live_ids())
            looked_at |= np.isin(ids, named)
        slots = np.sort(slots[looked_at])
        if not len(slots):
            return slots
        scores = np.empty((*queries.shape[:2], len(slots)), np.float32)
        for i in range(0, len(slots), SCAN):
            scores[..., i : i + SCAN] = block_scores(queries, self._summaries(slots[i : i + SCAN]))
        worth = relevance(scores)
        return slots[np.lexsort((self._ids[slots], -worth))[:count]]

    def read(self, slots: np.ndarray) -> np.ndarray:
        """Keys and values (layers, 2, g, n * block, p) float16 of the blocks in slots (n,)."""
        found = [self._block(int(slot)) for slot in slots]
        return np.concatenate(found, axis=3)

    def _block(self, slot: int) -> np.ndarray:
        if slot in self._cache:
            self._cache.move_to_end(slot)
            return self._cache[slot]
        waiting = self._waiting.get(slot)  # quantised as it will be on the disk: when it is written changes nothing
        payload = (
            quantised(waiting.block) if waiting is not None else self._files.read_payload(slot, int(self._crcs[slot]))
        )
        block = dequantised(payload, self.shape)
        self._cache[slot] = block
        while len(self._cache) > 1 and len(self._cache) * block.nbytes > self._half:
            self._cache.popitem(last=False)
        return block

    def positions(self, slots: np.ndarray) -> np.ndarray:
        """Position of each token of the blocks in slots (n,) in its own text, -1 where there is none: (n, block)."""
        place = np.arange(self.shape.block)
        return np.where(place < self._tokens[slots, None], self._starts[slots, None] + place, -1)

    def branches(self, slots: np.ndarray) -> np.ndarray:
        """The source of each slot."""
        return self._branches[slots]

    def token_ids(self, slots: np.ndarray) -> list[list[int]]:
        """The tokens of the blocks in slots; they must be on the disk, see `flush`."""
        entries, _ = self._files.entries()
        return [entries["ids"][slot, : self._tokens[slot]].tolist() for slot in slots]

    # --- upkeep

    def remove(self, branch: int) -> int:
        """Forget a source; how many blocks it had. Their room is used again."""
        self._source(branch)
        if any(s["parent"] == branch and not s.get("removed") for s in self._sources.values()):
            raise StoreError(f"{self.folder}: source {branch} is continued by others; remove those first")
        self.flush()
        self._log(branch, removed=True)
        slots = np.flatnonzero((self._ids > 0) & (self._branches == branch))
        for slot in slots:
            self._forget(int(slot))
            self._files.write_entry(int(slot), np.zeros((), self.shape.entry))
        self._segments.drop()
        return len(slots)

    def damaged(self) -> list[str]:
        """Read everything; what is not as it was written, in words. Blocks that were never finished are not damage."""
        self.flush()
        entries, torn = self._files.entries()
        found = [f"{torn} entries of the table"] if torn else []
        for slot in np.flatnonzero(self._ids > 0):
            try:
                self._files.read_payload(int(slot), int(self._crcs[slot]))
                summary = self._files.read_summaries(np.array([slot]))[0]
                if _crc(summary) != entries[slot]["summary"]:
                    found.append(f"summary of block {self._ids[slot]} in slot {slot}")
            except StoreError as error:
                found.append(str(error))
        return found

    def compacted(self) -> tuple[int, int]:
        """Rewrite the store without damaged blocks and holes; bytes on the disk before and after.

        The store is closed with it; blocks keep their numbers. The former one stays until the new one is whole.
        """
        self.flush()
        before, (entries, _) = self.nbytes, self._files.entries()
        with staged(self.folder, lambda _: None) as folder:
            Files.create(folder, self.shape, self.capacity, self._files.head["model"])
            new = Files(folder)
            for _, source in sorted(self._sources.items()):
                new.log({key: value for key, value in source.items() if key != "tip"})
            place = 0
            for slot in self._slots_of(self._live_ids()):
                try:
                    payload = self._files.read_payload(int(slot), int(self._crcs[slot]))
                except StoreError:
                    continue
                summary = self._files.read_summaries(np.array([slot]))[0]
                if _crc(summary) != entries[slot]["summary"]:
                    continue
                new.write_payload(place, payload)
                new.write_summary(place, summary)
                new.write_entry(place, entries[slot])
                place += 1
            new.sync()
            after = new.nbytes()
            new.close()
        self._shut()
        return before, after

    def flush(self) -> None:
        """Return once every block added so far is on the disk."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
        self._raise_failure()
        self._files.sync()

    def close(self) -> None:
        """Finish writing and let other processes in; a store that is closed stays so."""
        if self._open:
            try:
                self.flush()
            finally:
                self._shut()

    def _shut(self) -> None:
        self._open = False
        self._writers.shutdown(wait=True)
        self._segments.close()
        self._files.close()


def _crc(summary: np.ndarray) -> int:
    import zlib

    return zlib.crc32(summary.tobytes())


def is_store(folder: str | Path) -> bool:
    """Whether a folder is a store."""
    return (Path(folder) / HEAD).is_file()
