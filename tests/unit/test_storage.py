"""Storage: what goes in comes out, the budget holds, one process at a time, and nothing is lost to kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmojo_edge.storage import Store, StoreError
from bmojo_edge.storage_blocks import Shape, blocks_of, packed, unpacked
from bmojo_edge.storage_files import BLOCKS, ENTRIES, HEAD, SOURCES, SUMMARIES, _locked, is_store
from bmojo_edge.storage_index import block_scores, relevance

SHAPE = Shape(block=4, layers=(0, 2), router=1, pool=2, kv_heads=2, head_dim=8)
MODEL: dict[str, Any] = {
    "config": {"window": 16, "d_model": 32}, "tokenizer": "t", "weights": "w", "folder": "/models/a",
}  # fmt: skip
A_BLOCK = SHAPE.payload_bytes + SHAPE.entry.itemsize + 5 * SHAPE.summary_bytes


def kv_of(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Keys and values of two kept layers and the router."""
    return rng.standard_normal((3, 2, 2, 4 * blocks, 8)).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**6) as opened:
        yield opened


def fill(store: Store, blocks: int, seed: int = 0) -> tuple[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    kv, branch = kv_of(rng, blocks), store.begin(f"text {seed}", "file")
    store.add(branch, 0, np.arange(4 * blocks), kv)
    return branch, kv


# --- what goes in comes out


def read(store: Store, slots: np.ndarray) -> np.ndarray:
    """Keys and values (layers, 2, g, n * block, p) of blocks."""
    return unpacked(store.read(slots)[None], store.shape)[:, :, 0]


def test_eight_bits_are_near() -> None:
    kv = kv_of(np.random.default_rng(1), 3)[:, :, None]
    kv[0, 0, 0, 0, 0] = 0  # a token of zeros
    kv[1, 1, 0, 0, 1] *= 1e-4  # one whose scale has an inverse beyond float16's range
    blocks = blocks_of(packed(kv, SHAPE), SHAPE)
    got = unpacked(blocks.payloads[None], SHAPE)
    assert got.shape == (2, 2, 1, 2, 12, 8)
    largest = np.abs(kv[:2]).max(-1, keepdims=True)
    assert (np.abs(got - kv[:2]) <= largest * (0.5 / 127 + 2**-10) + 127 * 2.0**-25).all()
    assert blocks.summaries.shape == (3, 2, 2, 8)
    want = kv[2, 0, 0, :, 6:8].mean(1)  # the second pair of the second block, a head
    np.testing.assert_allclose(blocks.summaries[1, 1], want, atol=1e-3)


def test_what_is_never_read_is_copied_from_its_neighbours() -> None:
    """The first tokens of a text, and those that fill up its last block."""
    kv = kv_of(np.random.default_rng(1), 2)[:, :, None, :, :6]
    whole = kv[..., [2, 2, 2, 3, 4, 5, 5, 5], :]
    np.testing.assert_array_equal(packed(kv, SHAPE, skip=2), packed(whole, SHAPE))


def test_blocks_come_back_before_and_after_they_are_written(store: Store) -> None:
    branch, kv = fill(store, 5)
    slots = store.visible(store.next_id, 0, 0)
    assert len(slots) == len(store) == 5
    early = read(store, slots[[3, 1]])  # perhaps still on their way to the disk
    store.flush()
    late = read(store, slots[[3, 1]])
    np.testing.assert_array_equal(early, late)
    want = np.concatenate([kv[:2, :, :, 12:16], kv[:2, :, :, 4:8]], axis=3)
    assert np.abs(late - want).max() < 0.02
    np.testing.assert_array_equal(store.positions(slots[[3]]), [[12, 13, 14, 15]])
    assert store.token_ids(slots[[1]]) == [[4, 5, 6, 7]]
    assert (store.branches(slots) == branch).all()


def test_it_opens_as_it_was_closed(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**6) as store:
        branch, _ = fill(store, 3)
        store.complete(branch)
        slots = store.visible(store.next_id, 0, 0)
        want, sources = read(store, slots), store.sources
    with Store(tmp_path / "s", MODEL) as store:
        np.testing.assert_array_equal(read(store, store.visible(store.next_id, 0, 0)), want)
        assert store.sources == sources
        assert sources[0][:3] == (1, "text 0", "file") and sources[0].complete
        assert (sources[0].blocks, sources[0].tokens) == (3, 12)
        assert store.damaged() == []


# --- which blocks


def test_those_are_chosen_that_attention_weighs_most(store: Store) -> None:
    """Against attention over the summaries, query by query and head by head."""
    _, kv = fill(store, 20)
    rng = np.random.default_rng(5)
    queries = rng.standard_normal((4, 3, 8)).astype(np.float32)
    means = kv[2, 0].reshape(2, 20, 2, 2, 8).mean(3)  # (g, n, m, p)
    worth = np.zeros(20)
    for head in range(4):
        for q in queries[head]:
            best = (means[head // 2] @ q).max(-1)
            worth += np.exp(best) / np.exp(best).sum()
    slots = store.visible(store.next_id, 0, 0)
    got = store._ids[store.choose(queries, slots, 6)] - 1
    np.testing.assert_array_equal(got, np.argsort(-worth)[:6])
    assert len(store.choose(queries, slots[:2], 6)) == 2
    assert len(store.choose(queries, slots[:0], 6)) == 0


def test_a_blocks_score_is_its_best_summary_head_by_head() -> None:
    rng = np.random.default_rng(0)
    queries, summaries = rng.standard_normal((6, 3, 8)).astype("f4"), rng.standard_normal((5, 4, 2, 8)).astype("f2")
    got = block_scores(queries, summaries)
    assert got.shape == (6, 3, 5)
    for head in range(6):
        want = np.einsum("qp,nmp->qnm", queries[head], summaries[:, :, head // 3].astype("f4")).max(-1)
        np.testing.assert_allclose(got[head], want, rtol=1e-5)
    np.testing.assert_allclose(relevance(got).sum(), 18, rtol=1e-5)  # every query of every head gives 1


def test_a_sealed_segment_names_nearly_what_a_scan_finds(tmp_path: Path) -> None:
    pytest.importorskip("usearch", reason="the index of sealed segments is usearch's")
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((4, 3, 8)).astype(np.float32)
    found = {}
    for segment in (64, 10**6):
        with Store.create(tmp_path / str(segment), SHAPE, MODEL, disk_bytes=10**6, segment=segment) as store:
            fill(store, 200)
            assert store._segments.sealed(store.next_id) == (3 if segment == 64 else 0)
            slots = store.visible(store.next_id, 0, 0)
            found[segment] = set(store._ids[store.choose(queries, slots, 8)].tolist())
            again = set(store._ids[store.choose(queries, slots, 8)].tolist())
            assert again == found[segment]
    assert len(found[64] & found[10**6]) >= 7
    files = sorted(path.name for path in (tmp_path / "64").glob("*.usearch"))
    assert files == [f"index-{i}-{head}.usearch" for i in range(3) for head in range(2)]
    with Store(tmp_path / "64", MODEL, segment=64) as store:  # mapped from the files, and built again where one is lost
        slots = store.visible(store.next_id, 0, 0)
        assert set(store._ids[store.choose(queries, slots, 8)].tolist()) == found[64]


def test_a_branch_sees_its_own_past_and_nothing_of_its_siblings(store: Store) -> None:
    old, _ = fill(store, 2)
    horizon = store.next_id
    rng = np.random.default_rng(2)
    mine = store.begin("a", "session")
    store.add(mine, 0, np.arange(12), kv_of(rng, 3))
    fork = store.begin("a", "session", mine, 4)
    store.add(fork, 4, np.arange(4), kv_of(rng, 1))

    def seen(branch: int, limit: int) -> list[tuple[int, int]]:
        slots = store.visible(horizon, branch, limit)
        return sorted(zip(store.branches(slots).tolist(), store._starts[slots].tolist(), strict=True))

    before = [(old, 0), (old, 4)]
    assert seen(0, 100) == before
    assert seen(mine, 100) == [*before, (mine, 0), (mine, 4), (mine, 8)]
    assert seen(mine, 8) == [*before, (mine, 0), (mine, 4)]
    assert seen(fork, 100) == [*before, (mine, 0), (fork, 4)]
    assert store.tip(mine) == 12 and store.tip(fork) == 8
    with pytest.raises(StoreError, match="continued by others"):
        store.remove(mine)


# --- budgets and upkeep


def test_the_disk_budget_holds_and_the_oldest_go_first(tmp_path: Path) -> None:
    budget: Any = 20.0 * A_BLOCK
    with Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=budget) as store:
        fill(store, 50)
        store.flush()
        assert len(store) == store.capacity == 20
        assert sorted(store._ids[store._ids > 0]) == list(range(31, 51))
        sizes = [(tmp_path / "s" / name).stat().st_size for name in (BLOCKS, ENTRIES, "summaries.bin")]
        assert sum(sizes) <= budget
        assert store.damaged() == []
    with Store(tmp_path / "s", MODEL) as store:
        assert len(store) == 20 and store.next_id == 51


@pytest.mark.parametrize("capacity", [70, 200])
def test_indexes_of_forgotten_blocks_leave_the_disk(tmp_path: Path, capacity: int) -> None:
    pytest.importorskip("usearch", reason="the index of sealed segments is usearch's")
    shape = Shape(block=32, layers=(0, 1), router=1, pool=2, kv_heads=2, head_dim=64)
    budget = capacity * (shape.payload_bytes + shape.entry.itemsize + 5 * shape.summary_bytes)
    rng = np.random.default_rng(0)
    with Store.create(tmp_path / "s", shape, MODEL, disk_bytes=budget, segment=64) as store:
        branch, queries = store.begin("long", "session"), np.ones((2, 4, 64), np.float32)
        for start in range(0, 600 * 32, 20 * 32):
            kv = rng.standard_normal((2, 2, 2, 20 * 32, 64)).astype(np.float32)
            store.add(branch, start, np.arange(20 * 32), kv)
            slots = store.visible(store.next_id, 0, 0)
            assert len(store.choose(queries, slots, 5)) == 5
            store.flush()
            assert store.nbytes <= budget
        assert len(store) == store.capacity == capacity
        assert len(list((tmp_path / "s").glob("index-*-0.usearch"))) <= capacity // 64 + 1  # of 9


def test_the_ram_budget_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    with Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**7, ram_bytes=8 * SHAPE.payload_bytes) as store:
        write = store._files.write

        def watched(*arguments: Any) -> None:
            nonlocal most
            most = max(most, len(store._writer))
            write(*arguments)

        monkeypatch.setattr(store._files, "write", watched)
        fill(store, 100)
        assert 0 < most <= 8


def test_removing_and_compacting_leave_the_rest_as_it_was(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**6) as store:
        first, _ = fill(store, 10, seed=1)
        second, _ = fill(store, 6, seed=2)
        slots = store.visible(store.next_id, 0, 0)
        want = read(store, slots[store.branches(slots) == second])
        assert store.remove(first) == 10
        assert [source.branch for source in store.sources] == [second]
        with pytest.raises(StoreError, match=f"no source {first}"):
            store.remove(first)
        before, after = store.compacted()
        assert after < before
    with Store(tmp_path / "s", MODEL) as store:
        slots = store.visible(store.next_id, 0, 0)
        np.testing.assert_array_equal(read(store, slots), want)
        assert store._ids[slots].tolist() == list(range(11, 17))  # blocks keep their numbers
        assert store.damaged() == []
        assert store.begin("new", "file") == 3  # and sources theirs


def test_damage_is_found_and_left_out(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**6) as store:
        fill(store, 4)
    with (tmp_path / "s" / BLOCKS).open("r+b") as file:
        file.seek(2 * SHAPE.payload_bytes + 9)
        file.write(b"\x55\xaa")
    store = Store(tmp_path / "s", MODEL)
    with pytest.raises(StoreError, match=r"blocks.bin: block in slot 2 is damaged.*memory verify"):
        store.read(np.array([2]))
    assert len(store.damaged()) == 1
    store.compacted()
    with Store(tmp_path / "s", MODEL) as store:
        assert len(store) == 3 and store.damaged() == []


def test_an_entry_that_was_not_finished_is_an_empty_slot(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**6) as store:
        fill(store, 4)
    with (tmp_path / "s" / ENTRIES).open("r+b") as file:
        file.seek(3 * SHAPE.entry.itemsize + 5)
        file.write(b"\x01")
    with (tmp_path / "s" / SOURCES).open("ab") as file:
        file.write(b'{"branch": 9, "na')
    with Store(tmp_path / "s", MODEL) as store:
        assert len(store) == 3 and len(store.sources) == 1
        fill(store, 2, seed=3)
        assert len(store) == 5 and store.damaged() == []


# --- refusals


def test_a_closed_store_writes_into_no_other(tmp_path: Path) -> None:
    closed = Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**6)
    branch, kv = fill(closed, 2)
    closed.close()
    with Store.create(tmp_path / "t", SHAPE, MODEL, disk_bytes=10**6) as store:  # on the same file descriptors
        for use in (
            lambda: closed.begin("more", "file"),
            lambda: closed.add(branch, 8, np.arange(8), kv),
            lambda: closed.visible(9, 0, 0),
            lambda: closed.flush(),
        ):
            with pytest.raises(StoreError, match="s: is closed; open it again"):
                use()
        with pytest.raises(OSError, match="Bad file descriptor"):
            closed._files.log({"branch": 1})
        assert store.sources == [] and len(store) == 0


def test_two_processes_do_not_share_a_store(tmp_path: Path, store: Store) -> None:
    with pytest.raises(StoreError, match=f"in use by another process .process {os.getpid()}.; wait"):
        Store(store.folder, MODEL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"window": 8, "d_model": 32}}, r"config.window is 16 in the store and 8 .*/models/a"),
        ({"weights": "x"}, r"made with a model of other weights"),
        ({"tokenizer": "x"}, r"made with a model of other tokenizers"),
    ],
)
def test_another_model_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**6).close()
    with pytest.raises(StoreError, match=message):
        Store(tmp_path / "s", {**MODEL, **change})
    Store(tmp_path / "s", {**MODEL, "folder": "/elsewhere"}).close()  # and the lock was let go


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such store"):
        Store(tmp_path / "none")
    with pytest.raises(StoreError, match=r"is not a store: store.json is missing"):
        Store(tmp_path)
    Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**6).close()
    with pytest.raises(StoreError, match="s: is a store already"):
        Store.create(tmp_path / "s", SHAPE, MODEL)
    with pytest.raises(StoreError, match="exists and is no store"):
        Store.create(tmp_path, SHAPE, MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]  # and nothing was left in what is none
    with pytest.raises(StoreError, match="disk_bytes: 100 is less than 16 blocks"):
        Store.create(tmp_path / "t", SHAPE, MODEL, disk_bytes=100)
    (tmp_path / "s" / HEAD).write_text('{"format": "bmojo-edge store", "version": 9}')
    with pytest.raises(StoreError, match="version: is 9, this program reads 3"):
        Store(tmp_path / "s")


@pytest.mark.parametrize("field", ["id", "shape", "shape.layers", "shape.block", "capacity", "model"])
def test_a_damaged_head_is_told_by_field(tmp_path: Path, field: str) -> None:
    Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**6).close()
    head = json.loads((tmp_path / "s" / HEAD).read_text())
    *outer, last = field.split(".")
    del (head[outer[0]] if outer else head)[last]
    (tmp_path / "s" / HEAD).write_text(json.dumps(head))
    with pytest.raises(StoreError, match=rf"is damaged: {field.partition('.')[0]} is"):
        Store(tmp_path / "s")


def test_blocks_whose_source_is_lost_are_damage(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**6) as store:
        fill(store, 3)
        kept, _ = fill(store, 2, seed=1)
        store.flush()
    lines = (tmp_path / "s" / SOURCES).read_text().splitlines(keepends=True)
    (tmp_path / "s" / SOURCES).write_text("".join(line for line in lines if json.loads(line)["branch"] == kept))
    with Store(tmp_path / "s", MODEL) as store:
        assert len(store) == 2
        assert {source.branch for source in store.sources} == {kept}
        assert store.damaged() == [f"3 blocks of sources that {SOURCES} does not name"]
        store.compacted()
    with Store(tmp_path / "s", MODEL) as store:
        assert (len(store), store.damaged()) == (2, [])


@pytest.mark.parametrize("name", [HEAD, SOURCES, BLOCKS, SUMMARIES, ENTRIES])
def test_every_flipped_bit_is_seen(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "s"
    with Store.create(folder, SHAPE, MODEL, disk_bytes=10**6) as store:
        fill(store, 2)
        fill(store, 3, seed=1)
    raw, rng = (folder / name).read_bytes(), np.random.default_rng(0)
    for bit in (0, *rng.integers(0, 8 * len(raw) - 8, 20)):  # the first is the number of block 1, which becomes 0
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(flipped)
        if name == HEAD:
            with pytest.raises(StoreError, match=HEAD):
                Store(folder, MODEL)
        else:
            with Store(folder, MODEL) as store:
                assert store.damaged(), bit
    (folder / name).write_bytes(raw)
    with Store(folder, MODEL) as store:
        assert store.damaged() == []


@pytest.mark.parametrize("name", [SOURCES, BLOCKS, SUMMARIES, ENTRIES])
def test_a_file_that_is_gone_is_damage_and_claims_nothing(tmp_path: Path, name: str) -> None:
    with Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**6) as store:
        fill(store, 3)
    (tmp_path / "s" / name).unlink()
    with Store(tmp_path / "s", MODEL) as store:
        assert store.damaged()
        branch = store.begin("new", "file")
    with Store(tmp_path / "s", MODEL) as store:
        assert {source.branch: source.blocks for source in store.sources}[branch] == 0
        store.compacted()
    with Store(tmp_path / "s", MODEL) as store:
        assert store.damaged() == []


def test_a_damaged_index_is_told_and_made_anew(tmp_path: Path) -> None:
    pytest.importorskip("usearch", reason="the index of sealed segments is usearch's")
    queries = np.random.default_rng(1).standard_normal((4, 8, 8)).astype(np.float32)

    def chosen(store: Store) -> list[int]:
        return store.choose(queries, store.visible(store.next_id, 0, 0), 5).tolist()

    with Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**6, segment=64) as store:
        fill(store, 200)
        want = chosen(store)
    path = tmp_path / "s" / "index-1-0.usearch"
    raw = path.read_bytes()
    links = bytes([byte ^ 255 for byte in raw[-3000:]])  # usearch would follow them out of its memory
    for damaged in (raw[:-3000] + links, raw[: len(raw) // 2], b""):
        path.write_bytes(damaged)
        with Store(tmp_path / "s", MODEL, segment=64) as store:
            assert store.damaged() == [path.name]
            assert chosen(store) == want
            assert store.damaged() == []


def test_compacting_keeps_what_is_not_the_stores(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**6) as store:
        fill(store, 1)
        (tmp_path / "s" / "diary.txt").write_text("mine")
        with pytest.raises(StoreError, match=r"holds diary\.txt, which is not the store's"):
            store.compacted()
        (tmp_path / "s" / "diary.txt").rename(tmp_path / "diary.txt")
        name = store.id
        store.compacted()
    with Store(tmp_path / "s", MODEL) as store:
        assert (store.id, len(store)) == (name, 1)


def test_a_full_disk_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store._files, "write", full)
    fill(store, 1)
    with pytest.raises(StoreError, match=r"writing failed.*No space left"):
        store.flush()
    store._writer._failed = None  # the fixture closes it


def test_a_full_disk_leaves_no_part_of_a_source(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, 1)
    write, room = os.pwrite, iter([20])

    def nearly_full(descriptor: int, raw: Any, offset: int) -> int:
        n = next(room, 0)
        if not n:
            raise OSError(28, "No space left on device")
        return write(descriptor, raw[:n], offset)

    store.flush()
    monkeypatch.setattr(os, "pwrite", nearly_full)
    with pytest.raises(StoreError, match=r"sources\.jsonl: writing failed: .*No space left"):
        store.begin("lost", "file")
    monkeypatch.undo()  # there is room again
    fill(store, 1, seed=2)
    store.close()
    with Store(store.folder, MODEL) as again:
        assert [source.name for source in again.sources] == ["text 0", "text 2"]
        assert (len(again), again.damaged()) == (2, [])


# --- kill -9

KILLER = """
import os, random, signal, sys, time
import numpy as np
from tests.unit.test_storage import MODEL, SHAPE, kv_of
from bmojo_edge.storage import Store

folder, trials, rng = sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3]))
for trial in range(trials):
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        values = np.random.default_rng(trial)
        store = Store(folder, MODEL, ram_bytes=10**5)
        branch = store.begin("killed", "session")
        os.write(writes, b"0 ")
        for start in range(0, 10**9, 8):
            store.add(branch, start, np.full(8, start), kv_of(values, 2))
            if start % 400 == 0:
                store.flush()
                os.write(writes, b"%d " % store.next_id)
    os.read(reads, 2)
    time.sleep(rng.random() * 0.08)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(writes)
    flushed = [int(word) for word in os.read(reads, 10**6).split()]
    os.close(reads)
    with Store(folder, MODEL) as store:
        assert store.damaged() == [], (trial, store.damaged())
        assert store.next_id >= max(flushed, default=1), (trial, store.next_id, flushed)
        slots = store.visible(store.next_id, 0, 0)
        for slot, ids in zip(slots, store.token_ids(slots), strict=True):
            assert set(ids) == {store._starts[slot] // 8 * 8}, (trial, slot, ids)
        print(trial, store.next_id, len(store), flush=True)
"""


def kill_while_writing(folder: Path, trials: int, seed: int) -> None:
    """`trials` times: a process writes to the store, around its budget and on, and is killed; all is whole after it."""
    command = [sys.executable, "-c", KILLER, str(folder), str(trials), str(seed)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == trials
    assert int(lines[-1].split()[1]) > 40  # blocks were written, and more than the budget holds


KILLED_WHILE_REPLACING = """
import os, signal, sys
from bmojo_edge import staging
from bmojo_edge.storage import Store

def swap(folder, target, backup):
    target.rename(backup)
    os.kill(os.getpid(), signal.SIGKILL)

staging._swap = swap
Store(sys.argv[1]).compacted()
"""


def test_a_store_that_was_killed_while_it_was_replaced_is_put_back(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with Store.create(folder, SHAPE, MODEL, disk_bytes=10**6) as store:
        fill(store, 3)
    command = [sys.executable, "-c", KILLED_WHILE_REPLACING, str(folder)]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == -signal.SIGKILL
    assert not folder.exists() and is_store(folder)
    with pytest.raises(StoreError, match="s: is a store already"):
        Store.create(folder, SHAPE, MODEL)
    lock = _locked(next(tmp_path.glob(".s.old-*")))  # as while another process replaces it
    with pytest.raises(StoreError, match="in use by another process"):
        Store(folder, MODEL)
    os.close(lock)
    with Store(folder, MODEL) as store:
        assert (len(store), store.damaged()) == (3, [])
        store.compacted()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_store_whose_making_was_cut_off_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / f".{HEAD}.tmp-1-0").touch()
    Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=10**6).close()
    assert not list((tmp_path / "s").glob(".*"))


def test_kill_9_loses_no_store(tmp_path: Path) -> None:
    Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=40 * A_BLOCK).close()
    kill_while_writing(tmp_path / "s", 15, seed=1)


@pytest.mark.slow
def test_kill_9_a_thousand_times(tmp_path: Path) -> None:
    Store.create(tmp_path / "s", SHAPE, MODEL, disk_bytes=40 * A_BLOCK).close()
    kill_while_writing(tmp_path / "s", 1000, seed=1000)
