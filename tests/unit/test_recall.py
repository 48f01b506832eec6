"""A model with storage: the same whatever the split and the writer's pace, forks apart, texts found, budgets kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bmojo_edge.config import Config
from bmojo_edge.recall import RecallState, WithStorage, shape_for
from bmojo_edge.state import leaves
from bmojo_edge.storage import Store, StoreError
from tests.helpers import assert_close, odd, random_tokens, random_weights, to_numpy
from tests.twins import ENGINES, build

WINDOWED = odd(window=16, chunk=4, ssm=None, n_eidetic=3)
CASES = {"windowed": WINDOWED, "sinks alone": odd(window=16, chunk=4, ssm=None, n_eidetic=0, n_sinks=3),
         "all memories": odd(window=16, chunk=3), "no rope": odd(window=16, rope_theta=None),
         "mixed": odd("bmojo", "attention", "bmojo", window=16, attention_window=(None, 5, None))}  # fmt: skip
T = 64
BOUND = 2e-5


def identity(config: Config) -> dict[str, Any]:
    return {"config": config.to_dict(), "tokenizer": "", "weights": "", "folder": None}


def with_store(engine: str, config: Config, folder: Path, **options: Any) -> WithStorage:
    model = build(engine, config, random_weights(config))
    store = Store.create(folder, shape_for(config, block=4), identity(config), disk_bytes=10**7)
    return WithStorage(model, store, **{"top_k": 2, "every": 10, "queries": 3, **options})


def feed(lm: WithStorage, tokens: np.ndarray, state: RecallState, pieces: list[int]) -> tuple[np.ndarray, RecallState]:
    """Logits (b, v) after the last token, given in pieces; pieces of 1 are decoded."""
    begin, logits = 0, None
    for n in [*pieces, tokens.shape[1]]:
        part = tokens[:, begin : begin + n]
        if part.shape[1] == 1:
            logits, state = lm.decode_one_token(part[:, 0], state)
        elif part.shape[1]:
            logits, state = lm.prefill(part, state)
        begin += part.shape[1]
    return to_numpy(logits), state


def assert_same(got: RecallState, want: RecallState) -> None:
    for (name, a), (_, b) in zip(leaves(got), leaves(want), strict=True):
        a, b = to_numpy(a), to_numpy(b)
        if a.dtype == np.int64:
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            assert_close(a, b, BOUND, name)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[np.ndarray, RecallState]]:
    """Each case in one call."""
    found = {}
    for engine in ENGINES:
        for name, config in CASES.items():
            lm = with_store(engine, config, tmp_path_factory.mktemp("whole") / "s")
            found[engine, name] = feed(lm, random_tokens(config, 2, T), lm.init_state(2), [])
            lm.store.close()
    return found


# --- exactness


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.integers(1, 40), max_size=12))
def test_any_split_gives_the_same(
    name: str, engine: str, references: Any, tmp_path_factory: pytest.TempPathFactory, pieces: list[int]
) -> None:
    config = CASES[name]
    lm = with_store(engine, config, tmp_path_factory.mktemp("split") / "s")
    logits, state = feed(lm, random_tokens(config, 2, T), lm.init_state(2), pieces)
    ref, ref_state = references[engine, name]
    assert_close(logits, ref, BOUND)
    assert_same(state, ref_state)
    assert len(lm.store) == 2 * (T // 4)
    lm.store.close()


def test_the_twins_recall_the_same_blocks(references: Any) -> None:
    for name in CASES:
        (mlx, mlx_state), (torch, torch_state) = references["mlx", name], references["torch", name]
        assert_close(mlx, torch, BOUND)
        for ours, theirs in zip(mlx_state.layers, torch_state.layers, strict=True):
            if getattr(ours, "recalled", ()):
                positions = to_numpy(ours.recalled.positions)
                np.testing.assert_array_equal(positions, to_numpy(theirs.recalled.positions))
                assert (positions >= 0).any()
                assert positions.max() < T - 16  # what is in the window is not recalled


def test_the_writers_pace_changes_nothing(references: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = with_store("torch", WINDOWED, tmp_path / "s")
    write = lm.store._files.write

    def slowly(*arguments: Any) -> None:
        time.sleep(0.02)
        write(*arguments)

    monkeypatch.setattr(lm.store._files, "write", slowly)
    logits, state = feed(lm, random_tokens(WINDOWED, 2, T), lm.init_state(2), [31])
    np.testing.assert_allclose(logits, references["torch", "windowed"][0], rtol=1e-5, atol=1e-6)
    assert_same(state, references["torch", "windowed"][1])
    lm.store.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_choices_are_made_while_tokens_go_on(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that does not end holds nobody up before its blocks are due, one stretch later."""
    lm, tokens = with_store(engine, WINDOWED, tmp_path / "s"), random_tokens(WINDOWED, 1, T)
    go, choose = threading.Event(), lm.store.choose

    def held_up(*arguments: Any) -> np.ndarray:
        assert go.wait(20)
        return choose(*arguments)

    go.set()
    monkeypatch.setattr(lm.store, "choose", held_up)
    _, state = feed(lm, tokens[:, :50], lm.init_state(), [])
    before = to_numpy(state.layers[0].recalled.positions)
    go.clear()
    for t in range(50, 60):  # the first of these begins the choice, and the one after the last needs it
        _, state = lm.decode_one_token(tokens[:, t], state)
    went_on = to_numpy(state.layers[0].recalled.positions)  # what was asked for at 40
    assert (went_on >= 0).any() and (went_on != before).any()
    threading.Timer(0.2, go.set).start()
    began = time.perf_counter()
    _, state = lm.decode_one_token(tokens[:, 60], state)
    assert time.perf_counter() - began > 0.15
    lm.store.close()


@pytest.mark.parametrize("how", ["slow", "lost"])
def test_when_a_choice_ends_changes_nothing(
    how: str, references: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow one is waited for; one that was lost, as with a state from a file, is made anew."""
    lm = with_store("torch", WINDOWED, tmp_path / "s")
    choose = lm.store.choose
    if how == "slow":
        monkeypatch.setattr(lm.store, "choose", lambda *a: (time.sleep(0.05), choose(*a))[1])
    tokens, state, logits = random_tokens(WINDOWED, 2, T), lm.init_state(2), None
    for begin in range(0, T, 8):
        logits, state = lm.prefill(tokens[:, begin : begin + 8], state)
        if how == "lost":
            lm._begun.clear()
    np.testing.assert_allclose(to_numpy(logits), references["torch", "windowed"][0], rtol=1e-5, atol=1e-6)
    assert_same(state, references["torch", "windowed"][1])
    lm.store.close()


def test_blocks_that_are_being_chosen_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full store lets go of the oldest blocks only after choices begun before have read what they chose."""
    found = []
    for pause in (0.0, 0.05):
        model, shape = build("torch", WINDOWED, random_weights(WINDOWED)), shape_for(WINDOWED, block=4)
        a_block = shape.payload_bytes + shape.entry.itemsize + 5 * shape.summary_bytes
        store = Store.create(tmp_path / str(pause), shape, identity(WINDOWED), disk_bytes=16 * a_block)
        lm = WithStorage(model, store, top_k=2, every=10, queries=3)
        read = store.read
        monkeypatch.setattr(store, "read", lambda *a, p=pause, read=read: (time.sleep(p), read(*a))[1])
        assert store.capacity == 16
        logits, state = feed(lm, random_tokens(WINDOWED, 1, 200), lm.init_state(), [])
        assert int(store._ids.min()) > 1  # some were replaced
        found.append((logits, state))
        store.close()
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("engine", ENGINES)
def test_storage_is_read_and_without_it_nothing_changes(engine: str, references: Any) -> None:
    model, tokens = build(engine, WINDOWED, random_weights(WINDOWED)), random_tokens(WINDOWED, 2, T)
    logits, state = model.prefill(tokens, model.init_state(2))
    assert np.abs(to_numpy(logits) - references[engine, "windowed"][0]).max() > 1e-4
    assert all("recalled" not in name and "queries" not in name for name, _ in leaves(state))


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_to_storage_is_told(engine: str, tmp_path: Path) -> None:
    lm, tokens = with_store(engine, WINDOWED, tmp_path / "s"), random_tokens(WINDOWED, 1, T)
    _, state = feed(lm, tokens, lm.init_state(), [])
    more = random_tokens(WINDOWED, 1, 23, seed=5)  # blocks are chosen anew on the way
    want, want_state = lm.prefill(more, state)
    logits, state, shares = lm.prefill_with_attention(more, state)
    assert_close(logits, want, BOUND)
    assert_same(
        state._replace(branch=want_state.branch, seen=want_state.seen), want_state
    )  # both stored what they read
    for layer in shares:
        assert layer["storage"].shape == (1, WINDOWED.n_heads, more.shape[1])
        assert (layer["storage"] > 0).all()
        np.testing.assert_allclose(sum(layer.values()), 1, atol=1e-6)
    lm.store.close()


# --- forks and other conversations


@pytest.fixture
def lm(tmp_path: Path) -> Iterator[WithStorage]:
    found = with_store("torch", WINDOWED, tmp_path / "s")
    yield found
    found.store.close()


def test_what_was_taken_back_is_as_if_never_said(lm: WithStorage, tmp_path: Path) -> None:
    tokens, other = random_tokens(WINDOWED, 1, T), random_tokens(WINDOWED, 1, 60, seed=9)
    _, before = feed(lm, tokens[:, :40], lm.init_state(), [])
    feed(lm, other, before, [])  # said, and taken back
    logits, _ = feed(lm, tokens[:, 40:], before, [7])
    alone = with_store("torch", WINDOWED, tmp_path / "alone")
    want, _ = feed(alone, tokens, alone.init_state(), [])
    assert_close(logits, want, BOUND)
    alone.store.close()


def test_forks_never_affect_each_other(lm: WithStorage, tmp_path: Path) -> None:
    tokens = random_tokens(WINDOWED, 1, 30)
    endings = [random_tokens(WINDOWED, 1, 70, seed=seed) for seed in (1, 2, 3)]
    _, shared = feed(lm, tokens, lm.init_state(), [])
    states: list[RecallState] = [shared] * 3
    found: list[Any] = [None] * 3
    for begin in range(0, 70, 14):  # in turns
        for i, ending in enumerate(endings):
            found[i], states[i] = feed(lm, ending[:, begin : begin + 14], states[i], [])
    for i, ending in enumerate(endings):
        alone = with_store("torch", WINDOWED, tmp_path / f"alone {i}")
        want, _ = feed(alone, np.concatenate([tokens, ending], axis=1), alone.init_state(), [])
        assert_close(found[i], want, BOUND)
        alone.store.close()


def test_a_conversation_sees_what_was_there_when_it_began(lm: WithStorage) -> None:
    lm.keeps = False  # else the first conversation is a memory of the second
    branch = lm.add_text(random_tokens(WINDOWED, 1, 21, seed=4)[0].tolist(), "a text")
    assert [(s.name, s.kind, s.complete, s.blocks, s.tokens) for s in lm.store.sources] == [
        ("a text", "file", True, 6, 21)
    ]
    tokens = random_tokens(WINDOWED, 1, 5)
    _, state = lm.prefill_prompt(tokens, lm.init_state())
    positions = to_numpy(state.layers[0].recalled.positions)
    assert (positions == -2).any()  # of another text: seen before the window is full
    assert lm.store.branches(lm.store.visible(int(state.horizon[0]), 0, 0)).tolist() == [branch] * 6
    lm.store.remove(branch)
    _, state = lm.prefill_prompt(tokens, lm.init_state())
    assert (to_numpy(state.layers[0].recalled.positions) == -1).all()


def test_a_text_is_found_by_its_own_words(tmp_path: Path) -> None:
    """The queries of a passage look for the block they come from: one layer whose queries are its keys."""
    config = odd("bmojo", window=16, chunk=4, ssm=None, n_eidetic=0, n_sinks=0, n_heads=2, rope_theta=None)
    weights = random_weights(config)
    weights["layers.0.mixer.q_proj.weight"] = 4 * weights["layers.0.mixer.k_proj.weight"]
    lm = WithStorage(
        build("torch", config, weights),
        Store.create(tmp_path / "s", shape_for(config, block=4, pool=1), identity(config), disk_bytes=10**7),
    )
    text = np.random.default_rng(0).permutation(37)[:36].tolist()
    lm.add_text(text, "a text")
    for begin in range(0, 36, 4):
        slots = lm.search(text[begin : begin + 4], 1)
        assert lm.store.token_ids(slots) == [text[begin : begin + 4]]
    lm.store.close()


# --- bounds and refusals


def test_state_and_memory_stay_as_large_as_they_were(lm: WithStorage) -> None:
    tokens = random_tokens(WINDOWED, 1, 400)
    _, early = feed(lm, tokens[:, :100], lm.init_state(), [])
    _, late = feed(lm, tokens[:, 100:], early, [])
    assert [(name, leaf.nbytes) for name, leaf in leaves(late)] == [(name, leaf.nbytes) for name, leaf in leaves(early)]
    lm.store.flush()
    assert not len(lm.store._writer)


def test_what_cannot_be_is_refused(lm: WithStorage, tmp_path: Path) -> None:
    model = build("torch", WINDOWED, random_weights(WINDOWED))
    with pytest.raises(StoreError, match="window of two blocks, 64 tokens; the model's is 16"):
        shape_for(WINDOWED)
    with pytest.raises(StoreError, match="layers of type bmojo"):
        shape_for(odd("attention", ssm=None))
    with pytest.raises(ValueError, match="top_k: must be at least 1"):
        WithStorage(model, lm.store, top_k=0)
    wider = WINDOWED.replace(head_dim=8)
    with pytest.raises(StoreError, match="which this model has not"):
        WithStorage(build("torch", wider, random_weights(wider)), lm.store)
    state = lm.init_state(2)
    with pytest.raises(ValueError, match="of one length"):
        lm.prefill(random_tokens(WINDOWED, 2, 5), state, lengths=[5, 3])
    with pytest.raises(ValueError, match="move together"):
        lm.decode_one_token(np.array([1, 2]), state, active=[True, False])
