"""Storage: blocks of tokens' keys and values on the disk, chosen by attention, within a budget (docs/storage.md).

A store holds texts and the tokens that conversations let go of, for one model. Blocks are numbered as they come; a
background writer quantises and writes them while they can already be chosen and read. NumPy; it knows nothing of
engines, states or when to look something up (recall.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from bmojo_edge.allocator import return_large_buffers
from bmojo_edge.staging import staged
from bmojo_edge.storage_blocks import Blocks, Shape, packed
from bmojo_edge.storage_files import SOURCES, Files, StoreError, is_store, strangers
from bmojo_edge.storage_index import DEVICE_SCAN, SCAN, TILE, Segments, block_scores, relevance, rounded
from bmojo_edge.storage_writer import Writer

__all__ = ["Shape", "Source", "Store", "StoreError"]

DISK_BYTES, RAM_BYTES = 2**32, 2**28
SEGMENT, WRITERS = 8192, 4
INDEX_BYTES = 4  # for every byte of summaries: an index has twice as many, and a block can have an old one beside it


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


class Store:
    """An open store. Use it as a context manager, or `close` it.

    ram_bytes bounds the blocks that wait to be written; those that were read lately are kept by the system, not here.
    identity: of the model that will use it; None leaves it unchecked. segment: blocks of one index (for tests).
    Raises StoreError naming the folder, and the field in which the model is another.
    """

    def __init__(
        self, folder: str | Path, identity: Mapping[str, Any] | None = None, ram_bytes: int = RAM_BYTES,
        segment: int = SEGMENT, writers: int = WRITERS,
    ) -> None:  # fmt: skip
        return_large_buffers()
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
        self._room = max(ram_bytes // s.payload_bytes, 1)  # blocks that may wait to be written
        self._writer = Writer(self._files, self._crcs, self._room, writers)
        self._readers, self._read = 0, threading.Condition()
        self._open = True

    @classmethod
    def create(
        cls, folder: str | Path, shape: Shape, identity: Mapping[str, Any], disk_bytes: int = DISK_BYTES, **options: Any
    ) -> Self:
        """Make a store of at most `disk_bytes` on the disk, and open it; options are those of `Store`.

        Raises StoreError where the folder holds something already, or the budget is less than 16 blocks.
        """
        folder = Path(folder)
        if is_store(folder):
            raise StoreError(f"{folder}: is a store already")
        if folder.exists() and (not folder.is_dir() or strangers(folder)):
            raise StoreError(f"{folder}: exists and is no store; choose another name")
        a_block = shape.payload_bytes + shape.entry.itemsize + (1 + INDEX_BYTES) * shape.summary_bytes
        capacity = int(disk_bytes // a_block)  # 4e9 will do
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
        entries, _ = self._files.entries()
        self._end = len(entries)  # slots from here on were never used
        size = max(self._end, self.capacity)  # all there will be: nothing grows later, and untouched zeros cost nothing
        self._table = {name: np.zeros(size, np.int64) for name in ("id", "branch", "start", "tokens")}
        self._crcs = np.zeros(size, np.uint32)
        self._sources: dict[int, dict[str, Any]] = {}
        lines, self._lost_lines = self._files.read_sources()
        for line in lines:
            if "name" in line or line["branch"] in self._sources:  # else its first line is lost
                self._sources.setdefault(line["branch"], {}).update(line)
        self._last_branch = max(int(entries["branch"].max(initial=0)), *(line["branch"] for line in lines), 0)
        known = [branch for branch, source in self._sources.items() if not source.get("removed")]
        live = (entries["id"] > 0) & np.isin(entries["branch"], known)
        for name, column in (*self._table.items(), ("payload", self._crcs)):
            column[: self._end] = np.where(live, entries[name], 0)
        logged = max((source.get("next", 1) for source in self._sources.values()), default=1)
        self.next_id = max(int(self._ids.max(initial=0)) + 1, logged)  # no number is given twice

    @property
    def _ids(self) -> np.ndarray:
        """Numbers of the blocks in the slots that were ever used, 0 = none."""
        return self._table["id"][: self._end]

    @property
    def _branches(self) -> np.ndarray:
        return self._table["branch"][: self._end]

    @property
    def _starts(self) -> np.ndarray:
        return self._table["start"][: self._end]

    @property
    def _tokens(self) -> np.ndarray:
        return self._table["tokens"][: self._end]

    # --- what it holds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Blocks."""
        return int((self._ids > 0).sum())

    @property
    def id(self) -> str:
        """Tells this store from others, wherever it lies; kept by `compacted`."""
        return self._files.head["id"]

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
        self._require_open()
        branch = self._last_branch + 1  # blocks of sources that were lost are nobody's
        added = datetime.now(UTC).isoformat(timespec="seconds")
        self._log(branch, name=name, kind=kind, parent=parent, at=at, added=added)
        self._last_branch = branch
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

        ids (n * block,); kv (layers, 2, g, n * block, p): unrotated keys, and values, as `packed` takes them.
        tokens: how many are real, all where None; what is not must be 0.
        """
        s, real = self.shape, len(ids) if tokens is None else tokens
        room = self._room * s.block
        for i in range(0, len(ids), room):
            data, part = packed(kv[:, :, None, :, i : i + room], s), ids[i : i + room]
            self.add_packed([branch], start + i, part[None], lambda data=data: data, min(len(part), real - i))

    def add_packed(
        self, branches: Sequence[int], start: int, ids: np.ndarray, fetch: Callable[[], np.ndarray],
        tokens: int | None = None,
    ) -> None:  # fmt: skip
        """`add` for the rows of a batch, ids (b, n * block), whose `packed` bytes `fetch` waits for, in any thread.

        Waits only where more blocks wait to be written than `ram_bytes` allows. Raises StoreError where writing failed.
        """
        self._require_open()
        s, (b, t) = self.shape, ids.shape
        n, begins = b * t // s.block, np.tile(np.arange(0, t, s.block), b)
        entries = np.zeros(n, s.entry)
        entries["id"], entries["branch"] = self.next_id + np.arange(n), np.repeat(branches, t // s.block)
        real = t if tokens is None else tokens
        entries["start"], entries["tokens"] = start + begins, (real - begins).clip(0, s.block)
        entries["ids"] = ids.reshape(n, s.block)
        first, self.next_id = self.next_id, self.next_id + n
        entries = entries[-self.capacity :]  # the others would be replaced at once
        slots = self._free_slots(len(entries))
        for name, column in self._table.items():
            column[slots] = entries[name]
        self._writer.put(slots, entries, fetch)
        for ordinal in range((first - 1) // self._segments.segment, (self.next_id - 1) // self._segments.segment):
            self._segments.prepare(ordinal, self._live_ids())
        for branch in branches:
            self._source(branch)["tip"] = start + real

    def _free_slots(self, n: int) -> np.ndarray:
        """Slots (n,), ascending: empty ones first, then those of the oldest blocks, which are forgotten."""
        free = np.flatnonzero(self._ids[: self.capacity] == 0)[:n]
        fresh = np.arange(self._end, min(self._end + n - len(free), self.capacity))
        missing = n - len(free) - len(fresh)
        oldest = np.zeros(0, np.int64)
        if missing > 0:
            live = np.where(self._ids > 0, self._ids, np.iinfo(np.int64).max)[: self.capacity]
            oldest = live.argpartition(missing - 1)[:missing]
            self._forget(oldest)
        self._end += len(fresh)
        return np.sort(np.concatenate([free, fresh, oldest]))

    def _forget(self, slots: np.ndarray) -> None:
        """Let go of blocks in memory; on the disk they stay until something takes their place."""
        with self._read:
            self._read.wait_for(lambda: not self._readers)
        self._writer.settle(slots)
        self._ids[slots] = 0
        self._segments.forget(int(self._ids[self._ids > 0].min(initial=max(self.next_id - self.capacity, 1))))

    def begin_reading(self) -> None:
        """No block is forgotten until `end_reading`, called as often, so that another thread can choose and read."""
        with self._read:
            self._readers += 1

    def end_reading(self) -> None:
        """See `begin_reading`."""
        with self._read:
            self._readers -= 1
            self._read.notify_all()

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
        waiting, s = self._writer.summaries(slots), self.shape
        found = np.empty((rounded(len(slots), TILE), s.summaries, s.kv_heads, s.head_dim), np.float16)[: len(slots)]
        written = np.ones(len(slots), bool)
        for i, summary in waiting.items():
            found[i], written[i] = summary, False
        self._files.read_summaries(slots, np.flatnonzero(written), found)
        return found

    def visible(self, horizon: int, branch: int, limit: int) -> np.ndarray:
        """Slots that a conversation may see: all blocks numbered below `horizon`, and its own up to a position.

        Its own are those of its branch, and of the branches that one continues up to where it left them.
        """
        self._require_open()
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

    def choose(
        self, queries: np.ndarray, slots: np.ndarray, count: int, next_id: int | None = None,
        scorer: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Of the blocks in `slots`, the at most `count` that queries (h, q, p), scaled, attend to most, best first.

        Ties go to the older block. Sealed segments name their candidates first; all others are looked at. next_id: the
        number of the next block when this was asked, where that was earlier. scorer: scores blocks in place of NumPy.
        """
        ids = self._ids[slots]
        sealed = self._segments.sealed(self.next_id if next_id is None else next_id)
        ordinals = self._segments.ordinal(ids)
        looked_at = ordinals >= sealed
        for ordinal in np.unique(ordinals[~looked_at]):
            named = self._segments.candidates(int(ordinal), queries, self._live_ids())
            looked_at |= np.isin(ids, named)
        slots = np.sort(slots[looked_at])
        if not len(slots):
            return slots
        scores = np.empty((*queries.shape[:2], rounded(len(slots), SCAN)), np.float32)[..., : len(slots)]
        scan, scores_of = (SCAN, block_scores) if scorer is None else (DEVICE_SCAN, scorer)
        for i in range(0, len(slots), scan):
            scores[..., i : i + scan] = scores_of(queries, self._summaries(slots[i : i + scan]))
        worth = relevance(scores)
        return slots[np.lexsort((self._ids[slots], -worth))[:count]]

    def read(self, slots: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
        """Keys and values of the blocks in slots (n,) as they are on the disk: (n, payload_bytes) uint8.

        into: an array of at least n such rows, whose first n are filled and returned.
        """
        found = np.empty((len(slots), self.shape.payload_bytes), np.uint8) if into is None else into[: len(slots)]
        for payload, slot in zip(found, slots.tolist(), strict=True):
            waiting = self._writer.payload(slot)
            if waiting is None:
                self._files.read_payload(slot, int(self._crcs[slot]), payload)
            else:
                payload[:] = waiting
        return found

    def by_age(self, slots: np.ndarray) -> np.ndarray:
        """Slots (n,), the oldest block first."""
        return slots[self._ids[slots].argsort()]

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
        self._forget(slots)
        for slot in slots:
            self._files.empty(int(slot))
        self._segments.drop()
        return len(slots)

    def damaged(self) -> list[str]:
        """Read everything; what is not as it was written, in words. Blocks that were never finished are not damage."""
        self.flush()
        entries, torn = self._files.entries()
        found = [f"{torn} entries of the table"] if torn else []
        found += [f"{self._lost_lines} lines of {SOURCES}"] if self._lost_lines else []
        found += self._segments.damaged()
        lost = int(((entries["id"] > 0) & ~np.isin(entries["branch"], list(self._sources))).sum())
        found += [f"{lost} blocks of sources that {SOURCES} does not name"] if lost else []
        for slot in np.flatnonzero(self._ids > 0):
            try:
                self._files.read_payload(int(slot), int(self._crcs[slot]))
                summary = self._files.read_summary(int(slot))
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
        if others := strangers(self.folder):
            raise StoreError(f"{self.folder}: holds {others[0]}, which is not the store's; move it elsewhere first")
        before, (entries, _) = self.nbytes, self._files.entries()
        with staged(self.folder, lambda _: None) as folder:
            Files.create(folder, self.shape, self.capacity, self._files.head["model"], self.id)
            new = Files(folder)
            for _, source in sorted(self._sources.items()):
                new.log({key: value for key, value in source.items() if key != "tip"})
            place = 0
            for slot in self._slots_of(self._live_ids()):
                try:
                    payload = self._files.read_payload(int(slot), int(self._crcs[slot]))
                    summary = self._files.read_summary(int(slot))
                except StoreError:
                    continue
                if _crc(summary) != entries[slot]["summary"]:
                    continue
                new.write(place, entries[slot : slot + 1], Blocks(payload[None], summary[None]))
                place += 1
            new.sync()
            after = new.nbytes()
            new.close()
        self._shut()
        return before, after

    def flush(self) -> None:
        """Return once every block added so far is on the disk."""
        self._require_open()
        self._writer.settle()
        self._writer.check()
        self._files.sync()

    def close(self) -> None:
        """Finish writing and let other processes in; a store that is closed stays so."""
        if self._open:
            try:
                self.flush()
            finally:
                self._shut()

    def _require_open(self) -> None:
        if not self._open:
            raise StoreError(f"{self.folder}: is closed; open it again")

    def _shut(self) -> None:
        self._open = False
        with self._read:
            self._read.wait_for(lambda: not self._readers)
        self._writer.close()
        self._segments.close()
        self._files.close()


def _crc(summary: np.ndarray) -> int:
    import zlib

    return zlib.crc32(summary.tobytes())
