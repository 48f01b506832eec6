"""The MLX twin against the float64 oracle: logits, every leaf of the state, innovations, sets, in every dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bmojo_edge import reference
from bmojo_edge.config import Config
from bmojo_edge.parameters import parameter_shapes
from tests.helpers import (
    GRID,
    as_stored,
    assert_close,
    assert_states_close,
    assert_states_equal,
    odd,
    random_tokens,
    random_weights,
    to_numpy,
)

mx = pytest.importorskip("mlx.core")

from mlx.utils import tree_flatten  # noqa: E402

from bmojo_edge.mlx import Model, load_weights  # noqa: E402

# Unit roundoff u of each dtype. The error of a two-layer model, measured over the grid and several seeds, is at most
# 7 u in logits and 24 u in states (scores and SSM states, where differences of like values are squared or summed);
# a score that is large because its signal is near 0 has up to 80 u of its own.
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
LOGITS, STATES, SCORES = 12, 48, 160
U = ROUNDOFF["float32"]


def model_of(config: Config, seed: int = 0) -> Model:
    return load_weights(Model(config), random_weights(config, seed))


def assert_same(got, ref) -> None:
    """Logits, state and memory of a float32 run."""
    (logits, state, memory), (ref_logits, ref_state, ref_memory) = got, ref
    np.testing.assert_array_equal(to_numpy(memory.eidetic_index), ref_memory.eidetic_index)
    assert_close(logits, ref_logits, LOGITS * U, "logits")
    assert_states_close(state, ref_state, SCORES * U)
    assert_close(memory.scores, ref_memory.scores, SCORES * U, "scores")


@pytest.mark.parametrize("name", GRID)
def test_equals_the_oracle(name: str) -> None:
    config = GRID[name]
    weights, model, tokens = random_weights(config), model_of(config), random_tokens(config, 2, 41)
    ref = reference.forward(config, weights, tokens, return_memory=True)
    got = model.forward_with_memory(tokens)
    assert_same(got, ref)
    # Rows go on at different positions, and then token by token, one of them with pauses.
    tokens, lengths = random_tokens(config, 2, 23, seed=1), [7, 19]
    ref = reference.forward(config, weights, tokens, ref[1], lengths=lengths, return_memory=True)
    got = model.forward_with_memory(tokens, got[1], lengths=lengths)
    assert_same(got, ref)
    state, ref_state = got[1], ref[1]
    for step in range(7):
        token, active = random_tokens(config, 2, 1, seed=2 + step), np.array([True, step % 3 != 1])
        want, ref_state = reference.forward(config, weights, token, ref_state, lengths=active.astype(int))
        logits, state = model.decode_one_token(token[:, 0], state, None if active.all() else active)
        assert_close(logits, want[:, 0], 2 * LOGITS * U, f"logits of step {step}")
        assert_states_close(state, ref_state, SCORES * U)


@pytest.mark.parametrize("name", ["all", "mixed", "many sinks", "no ssm"])
def test_rows_of_no_tokens_keep_their_state(name: str) -> None:
    config = GRID[name]
    weights, model, tokens = random_weights(config), model_of(config), random_tokens(config, 3, 30)
    state, ref_state = None, None
    for lengths in ([0, 13, 30], [21, 0, 2], [0, 0, 0], [30, 30, 1]):
        ref = reference.forward(config, weights, tokens, ref_state, lengths=lengths, return_memory=True)
        got = model.forward_with_memory(tokens, state, lengths=lengths)
        assert_same(got, ref)
        state, ref_state = got[1], ref[1]


def random_sets(config: Config, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Sets (batch, n_layers, n_chunks, e) drawn from what each chunk may hold."""
    rng, n_chunks = np.random.default_rng(seed), -(-length // config.chunk_size)
    sets = np.full((batch, len(config.layer_types), n_chunks, config.n_eidetic), -1)
    for index in np.ndindex(sets.shape[:3]):
        limit = (index[2] + 1) * config.chunk_size - config.window
        eligible = np.arange(config.n_sinks, max(limit, config.n_sinks))
        picks = np.sort(rng.permutation(eligible)[: rng.integers(0, config.n_eidetic + 1)])
        sets[*index, : len(picks)] = picks
    return sets


@pytest.mark.parametrize("name", ["all", "no ssm", "chunk of one", "chunk is window", "no sinks", "mixed"])
def test_forced_sets_equal_the_oracle(name: str) -> None:
    config = GRID[name]
    weights, tokens = random_weights(config), random_tokens(config, 2, 40)
    model, forced = model_of(config), random_sets(config, 2, 40)
    for layer, kind in enumerate(config.layer_types):
        if kind != "bmojo":
            forced[:, layer] = -1
    ref = reference.forward(config, weights, tokens, eidetic_index=forced, return_memory=True)
    got = model.forward_with_memory(tokens, eidetic_index=forced)
    assert_same(got, ref)
    # A second call begins inside a chunk, which has its set already: the first forced set is not read.
    cut = 40 - 40 % config.chunk_size if config.chunk_size > 1 else 39
    sets = np.repeat(to_numpy(got[2].eidetic_index)[:, :, -1:], -(-9 // config.chunk_size) + 1, axis=2)
    _, state = model.forward(tokens[:, : cut + 1], eidetic_index=forced)
    _, ref_state = reference.forward(config, weights, tokens[:, : cut + 1], eidetic_index=forced)
    ref = reference.forward(config, weights, tokens[:, :9], ref_state, eidetic_index=sets, return_memory=True)
    assert_same(model.forward_with_memory(tokens[:, :9], state, eidetic_index=sets), ref)


def test_impossible_sets_are_refused() -> None:
    config = GRID["all"]
    model, forced = model_of(config), random_sets(config, 1, 40)
    for position in (30, 0):  # still in the window of chunk 5; a sink
        forced[0, 0, 5, 0] = position
        with pytest.raises(ValueError, match=f"eidetic_index: position {position} "):
            model.forward(random_tokens(config, 1, 40), eidetic_index=forced)
    with pytest.raises(ValueError, match="eidetic_index: must have shape"):
        model.forward(random_tokens(config, 1, 40), eidetic_index=forced[..., :-1])


def chosen(config: Config, scores: np.ndarray, n_chunks: int) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The set of every (row, layer, chunk) by sorting scores (b, n_layers, t)."""
    for index in np.ndindex(*scores.shape[:2], n_chunks):
        limit = min((index[2] + 1) * config.chunk_size - config.window, scores.shape[2])
        eligible = np.arange(config.n_sinks, max(limit, config.n_sinks))
        s = scores[index[:2]][eligible]
        yield index, eligible[np.lexsort((eligible, -s))[: config.n_eidetic]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", GRID)
def test_half_precision(name: str, dtype: str) -> None:
    config, u = GRID[name], ROUNDOFF[dtype]
    weights, tokens = as_stored(random_weights(config), dtype), random_tokens(config, 2, 41)
    model = load_weights(Model(config.replace(dtype=dtype)), weights)
    kept = (".A_log", ".D", ".dt_proj.bias")
    parameters: Any = tree_flatten(model.parameters())
    assert all(p.dtype == (mx.float32 if key.endswith(kept) else getattr(mx, dtype)) for key, p in parameters)
    logits, state, memory = model.forward_with_memory(tokens)
    sets = to_numpy(memory.eidetic_index)
    forced = sets if config.n_eidetic and "bmojo" in config.layer_types else None
    ref, ref_state, ref_memory = reference.forward(config, weights, tokens, eidetic_index=forced, return_memory=True)
    assert logits.dtype == getattr(mx, dtype)
    assert_close(logits, ref, LOGITS * u, "logits")
    assert_states_close(state, ref_state, STATES * u)
    layers = [i for i, kind in enumerate(config.layer_types) if kind == "bmojo"]
    if forced is not None:  # the sets are exactly those of the twin's own scores, and these are near the oracle's
        scores = to_numpy(memory.scores)
        assert_close(scores, ref_memory.scores, STATES * u, "scores")
        for index, best in chosen(config, scores[:, layers], sets.shape[2]):
            got = sets[:, layers][index]
            np.testing.assert_array_equal(np.sort(got[got >= 0]), np.sort(best))
    # One more token through the decoding path, on the same memories.
    token = random_tokens(config, 2, 1, seed=9)
    ref, ref_state = reference.forward(config, weights, token, ref_state)
    logits, state = model.decode_one_token(token[:, 0], state)
    assert logits.dtype == getattr(mx, dtype)
    assert_close(logits, ref[:, 0], 2 * LOGITS * u, "decoded logits")
    assert_states_close(state, ref_state, STATES * u)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_changes_only_near_ties(dtype: str) -> None:
    """A token kept or dropped against the oracle scores within 4 eps of the e-th (at width 20 scores err more)."""
    config, differing = Config.preset("tiny", window=8, chunk=4, n_fading=8, n_eidetic=8), 0
    for seed in range(3):
        weights, tokens = as_stored(random_weights(config, seed), dtype), random_tokens(config, 2, 60, seed)
        _, _, memory = load_weights(Model(config.replace(dtype=dtype)), weights).forward_with_memory(tokens)
        sets = to_numpy(memory.eidetic_index)
        _, _, ref = reference.forward(config, weights, tokens, eidetic_index=sets, return_memory=True)
        for index, best in chosen(config, ref.scores, sets.shape[2]):
            s, got = ref.scores[index[:2]], sets[index]
            differ = np.setxor1d(got[got >= 0], best)
            differing += len(differ)
            if len(differ):
                assert np.abs(s[differ] / s[best].min() - 1).max() <= 8 * ROUNDOFF[dtype]  # 4 eps
    assert differing or dtype == "float16"  # bfloat16 does change some


@pytest.mark.parametrize("name", ["all", "mixed", "yarn", "no rope"])
def test_offset_changes_nothing(name: str) -> None:
    config = GRID[name]
    model, tokens = model_of(config), random_tokens(config, 2, 40)
    ref, ref_state = model.forward(tokens[:, :37], model.init_state(2))
    for offset in (10**9, 2**40 - 20):
        got, state = model.forward(tokens[:, :37], model.init_state(2, offset=offset))
        assert_close(got, ref, 2e-6, f"offset {offset}")
        assert_states_equal(state.position, ref_state.position)
        now, now_ref = state, ref_state
        for token in tokens[:, 37:].T:
            (one, now), (one_ref, now_ref) = model.decode_one_token(token, now), model.decode_one_token(token, now_ref)
            assert_close(one, one_ref, 2e-6, f"offset {offset}, decoded")


def test_names_and_shapes_are_the_contract() -> None:
    for config in GRID.values():
        parameters = dict(tree_flatten(Model(config).parameters()))
        assert {name: p.shape for name, p in parameters.items()} == parameter_shapes(config)
        assert all(p.dtype == mx.float32 for p in parameters.values())


def test_long_sequences_cross_tiles_and_scan_chunks() -> None:
    """Lengths beyond QUERY_TILE, SCAN_STEPS and SCAN_TOKENS, where the odd sizes above fit in one of each."""
    config = odd("bmojo", "attention", d_model=12, head_dim=4, window=70, n_fading=33, chunk=13, n_eidetic=9, d_ff=0)
    weights, model, tokens = random_weights(config), model_of(config), random_tokens(config, 2, 300)
    ref = reference.forward(config, weights, tokens, return_memory=True)
    got = model.forward_with_memory(tokens)
    assert_same(got, ref)
    ref = reference.forward(config, weights, tokens, ref[1], lengths=[300, 131], return_memory=True)
    got = model.forward_with_memory(tokens, got[1], lengths=[300, 131])
    assert_same(got, ref)
    ref = reference.forward(config, weights, tokens, ref[1], lengths=[17, 300], return_memory=True)
    assert_same(model.forward_with_memory(tokens, got[1], lengths=[17, 300]), ref)
