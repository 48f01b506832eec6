"""Which blocks the queries of a chunk look for: exactly over recent blocks, by a mapped index over sealed ones.

Blocks are numbered; every SEGMENT of them in a row is sealed into one usearch index a key/value head, a file that is
mapped and not loaded. NumPy; knows summaries and queries, not where they come from (docs/storage.md).
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

SCAN = 1024  # blocks whose summaries are in memory at one time
DEVICE_SCAN = 4096  # the same for a device: every call of another thread holds up the one that feeds it
TILE = 128  # blocks that are scored at one time
NEIGHBOURS = 16  # summary vectors an index is asked for, by query


def block_scores(queries: np.ndarray, summaries: np.ndarray) -> np.ndarray:
    """The best score of each block for each query: (h, q, n), from queries (h, q, p) and summaries (n, m, g, p).

    TILE blocks at a time, in arrays of one size: those stay in the processor's cache, and memory keeps no holes.
    """
    (h, q, p), (n, m, g, _) = queries.shape, summaries.shape
    best = np.empty((rounded(n, TILE), g, h // g * q), np.float32)[:n]
    wanted = np.ascontiguousarray(queries.reshape(g, -1, p).transpose(0, 2, 1))
    keys, products = np.empty((TILE, m, p), np.float32), np.empty((TILE, m, h // g * q), np.float32)
    for i in range(0, n, TILE):
        count = min(TILE, n - i)
        for head in range(g):
            keys[:count] = summaries[i : i + count, :, head]
            np.matmul(keys[:count].reshape(-1, p), wanted[head], out=products[:count].reshape(count * m, -1))
            products[:count].max(1, out=best[i : i + count, head])
    return best.reshape(n, h, q).transpose(1, 2, 0)


def rounded(n: int, size: int) -> int:
    """n, or the next multiple of size: arrays whose lengths grow bit by bit leave holes of every size in memory."""
    return -(-n // size) * size


def relevance(scores: np.ndarray) -> np.ndarray:
    """(n,): what attention each query of each head would give to blocks with these best scores (h, q, n), summed.

    The scores are overwritten: they are the largest array of a choice.
    """
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    return np.einsum("hqn,hq->n", scores, 1 / scores.sum(-1))


class Segments:
    """The sealed segments of a store, each the index files of `segment` blocks that were numbered in a row.

    per_block: summary vectors of a block; heads: key/value heads; summaries_of(ids): (n, per_block, heads, p).
    """

    def __init__(
        self, folder: Path, segment: int, per_block: int, heads: int, summaries_of: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self.folder, self.segment, self._summaries_of = folder, segment, summaries_of
        self._per_block, self._heads = per_block, heads
        self._open: dict[int, list[Any]] = {}
        self._building: dict[int, Future[None]] = {}
        self._forgotten = 0  # segments before this one have no files
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="index")
        self._lock = threading.RLock()  # choices may run beside each other

    def sealed(self, next_id: int) -> int:
        """How many segments have an index in use once `next_id` is the number of the next block.

        A function of the number alone: after a segment an eighth of it passes before its index is used, and it is
        built in the meantime.
        """
        return max(0, (next_id - 1 - self.segment // 8) // self.segment)

    def ordinal(self, ids: np.ndarray) -> np.ndarray:
        """Segments of blocks, which are numbered from 1."""
        return (ids - 1) // self.segment

    def prepare(self, ordinal: int, ids: np.ndarray) -> None:
        """Start building a segment's index where there is none; ids: all blocks there are."""
        with self._lock:
            if ordinal < 0 or ordinal in self._building or ordinal in self._open or self._path(ordinal, 0).exists():
                return
            mine = ids[self.ordinal(ids) == ordinal]
            self._building[ordinal] = self._pool.submit(self._build, ordinal, mine, self._summaries_of(mine))

    def _opened(self, ordinal: int, ids: np.ndarray) -> list[Any]:
        """The index of each head of a segment, built first where it is not there."""
        with self._lock:
            paths = [self._path(ordinal, head) for head in range(self._heads)]
            if ordinal not in self._open and ordinal not in self._building and not all(map(_whole, paths)):
                for path in paths:
                    path.unlink(missing_ok=True)
            self.prepare(ordinal, ids)
            if ordinal in self._building:
                self._building.pop(ordinal).result()
            if ordinal not in self._open:
                usearch = _usearch()
                self._open[ordinal] = [usearch.Index.restore(str(path), view=True) for path in paths]
            return self._open[ordinal]

    def candidates(self, ordinal: int, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Numbers of the blocks of a segment that any of the queries (h, q, p) may be looking for, ascending."""
        indexes = self._opened(ordinal, ids)
        found = []
        for index, wanted in zip(indexes, queries.reshape(self._heads, -1, queries.shape[-1]), strict=True):
            if len(index):
                radius = np.linalg.norm(np.asarray(index.get(index.keys[0]), np.float32))  # that of all vectors
                wanted = wanted * (radius / np.maximum(np.linalg.norm(wanted, axis=1, keepdims=True), 1e-6))
                wanted = np.pad(wanted, ((0, 0), (0, 1))).astype(np.float16)
                found.append(np.asarray(index.search(wanted, NEIGHBOURS, threads=0).keys).reshape(-1))
        places = np.unique(np.concatenate(found).astype(np.int64) // self._per_block) if found else np.zeros(0, int)
        return places + ordinal * self.segment + 1

    def damaged(self) -> list[str]:
        """Names of index files that are not as they were written; they are made anew when they are needed."""
        return [path.name for path in sorted(self.folder.glob("index-*.usearch")) if not _whole(path)]

    def forget(self, oldest: int) -> None:
        """Remove the indexes of segments that end before the block numbered `oldest`, once they are built."""
        with self._lock:
            while self._forgotten < (oldest - 1) // self.segment:
                building = self._building.get(self._forgotten)
                if building is not None and not building.done():
                    return
                self._building.pop(self._forgotten, None)
                self._open.pop(self._forgotten, None)
                for head in range(self._heads):
                    path = self._path(self._forgotten, head)
                    path.unlink(missing_ok=True)
                    path.with_suffix(".partial").unlink(missing_ok=True)
                self._forgotten += 1

    def drop(self) -> None:
        """Forget all indexes and remove their files."""
        self._pool.shutdown(wait=True)
        self._open.clear()
        self._building.clear()
        for path in self.folder.glob("index-*.usearch"):
            path.unlink()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="index")

    def close(self) -> None:
        """Wait for what is being built."""
        self._pool.shutdown(wait=True)
        self._open.clear()

    def _path(self, ordinal: int, head: int) -> Path:
        return self.folder / f"index-{ordinal}-{head}.usearch"

    def _build(self, ordinal: int, ids: np.ndarray, summaries: np.ndarray) -> None:
        """Inner products as distances: keys about their mean, and one more dimension that makes all norms equal."""
        (n, m, g, p), usearch = summaries.shape, _usearch()
        keys = ((ids - 1) % self.segment * m)[:, None] + np.arange(m)
        for head in reversed(range(g)):  # with the first file, all are there
            vectors = summaries[:, :, head].reshape(n * m, p).astype(np.float32)
            if n:
                vectors -= vectors.mean(0)
            norms = (vectors**2).sum(1)
            vectors = np.concatenate([vectors, np.sqrt(norms.max(initial=0) - norms)[:, None]], axis=1)
            index = usearch.Index(
                ndim=p + 1, metric="l2sq", dtype="f16", connectivity=12, expansion_add=64, expansion_search=128
            )
            if n:
                index.add(keys.reshape(-1).astype(np.uint64), vectors.astype(np.float16), threads=1)
            path = self._path(ordinal, head)
            partial = path.with_suffix(".partial")
            index.save(str(partial))
            with partial.open("ab") as file:  # usearch reads what is before it
                file.write(_crc(partial, partial.stat().st_size).to_bytes(4, "little"))
            partial.replace(path)


def _crc(path: Path, size: int) -> int:
    """CRC-32 of the first `size` bytes of a file, a part at a time."""
    crc = 0
    with path.open("rb") as file:
        for begin in range(0, size, 2**20):
            crc = zlib.crc32(file.read(min(2**20, size - begin)), crc)
    return crc


def _whole(path: Path) -> bool:
    """Whether an index file is there as it was written; usearch follows links in a damaged one anywhere."""
    size = path.stat().st_size - 4 if path.is_file() else -1
    if size < 0:
        return False
    with path.open("rb") as file:
        file.seek(size)
        return file.read() == _crc(path, size).to_bytes(4, "little")


def _usearch() -> Any:
    import usearch.index

    return usearch.index
