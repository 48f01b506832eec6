"""The background writer of a store: blocks on their way to the disk, which can be read meanwhile.

It knows slots and bytes, not what is in them or why (docs/storage.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bmojo_edge.storage_blocks import Blocks, blocks_of
from bmojo_edge.storage_files import Files, StoreError

PART = 16  # blocks that a thread writes at least, where there are so many: threads hold each other up


class _Batch:
    """Blocks that came together; their bytes may still be on their way from a device."""

    def __init__(self, slots: np.ndarray, entries: np.ndarray, fetch: Callable[[], np.ndarray], files: Files) -> None:
        self.slots, self.entries, self._fetch, self._shape = slots, entries, fetch, files.shape
        self._blocks: Blocks | None = None

    def blocks(self) -> Blocks:
        """The last ones of what is fetched, as many as there are slots."""
        if self._blocks is None:
            payloads, summaries = blocks_of(self._fetch(), self._shape)
            first = len(payloads) - len(self.slots)
            self._blocks = Blocks(payloads[first:], summaries[first:])
        return self._blocks


class Writer:
    """Writes blocks to a store's files in `threads` threads; at most `limit` blocks wait, or one batch.

    crcs (slots,) uint32: where the checksums of written payloads go.
    """

    def __init__(self, files: Files, crcs: np.ndarray, limit: int, threads: int) -> None:
        self._files, self._crcs, self._limit, self._threads = files, crcs, limit, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="store")
        self._waiting: dict[int, tuple[_Batch, int]] = {}  # by slot: a batch, and the place in it
        self._changed = threading.Condition()
        self._failed: BaseException | None = None

    def __len__(self) -> int:
        """Blocks that wait."""
        return len(self._waiting)

    def put(self, slots: np.ndarray, entries: np.ndarray, fetch: Callable[[], np.ndarray]) -> None:
        """Have entries (n,) and their blocks written to slots (n,); waits while more are waiting than may.

        fetch: the bytes of the blocks, `storage_blocks.packed`; of more than n the last n count.
        """
        self.check()
        batch = _Batch(slots, entries, fetch, self._files)
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or len(self._waiting) + len(slots) <= self._limit)
            self._waiting.update({int(slot): (batch, place) for place, slot in enumerate(slots)})
        runs = np.split(np.arange(len(slots)), np.flatnonzero(np.diff(slots) != 1) + 1)
        for run in runs:
            for part in np.array_split(run, min(-(-len(run) // PART), self._threads)):
                self._pool.submit(self._write, batch, part)

    def _write(self, batch: _Batch, part: np.ndarray) -> None:
        """Write neighbours of a batch."""
        slots, places = batch.slots[part], slice(int(part[0]), int(part[-1]) + 1)
        try:
            payloads, summaries = batch.blocks()
            entries = batch.entries[places]
            self._files.write(int(slots[0]), entries, Blocks(payloads[places], summaries[places]))
            self._crcs[slots] = entries["payload"]
        except BaseException as error:
            self._failed = error
        finally:
            with self._changed:
                for slot in slots:
                    self._waiting.pop(int(slot), None)
                self._changed.notify_all()

    def check(self) -> None:
        """Raise StoreError where writing failed."""
        if self._failed is not None:
            raise StoreError(f"{self._files.folder}: writing failed: {self._failed}") from self._failed

    def payload(self, slot: int) -> np.ndarray | None:
        """Keys and values of a block that waits, as bytes; None where none does."""
        found = self._waiting.get(slot)
        return None if found is None else found[0].blocks().payloads[found[1]]

    def summaries(self, slots: np.ndarray) -> dict[int, np.ndarray]:
        """Summaries of those of the slots (n,) whose blocks wait, by their place among the n."""
        with self._changed:
            if not self._waiting:
                return {}
            found = {i: self._waiting[slot] for i, slot in enumerate(slots.tolist()) if slot in self._waiting}
        return {i: batch.blocks().summaries[place] for i, (batch, place) in found.items()}

    def settle(self, slots: np.ndarray | None = None) -> None:
        """Return once nothing waits for the slots, for any where None."""

        def settled() -> bool:
            return not self._waiting if slots is None else self._waiting.keys().isdisjoint(slots.tolist())

        with self._changed:
            self._changed.wait_for(settled)

    def close(self) -> None:
        """Finish, and end the threads."""
        self._pool.shutdown(wait=True)
