"""The PyTorch twin against the float64 oracle: logits, every leaf of the state, innovations, sets, gradients' values.

Run in float64 the twin must give the oracle's numbers outright, so every semantic is checked without tolerance to
hide in; the model's dtypes are then checked with the rounding each explains.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from bmojo_edge import reference
from bmojo_edge.config import Config
from bmojo_edge.parameters import parameter_shapes
from tests.helpers import (
    GRID,
    assert_close,
    assert_states_close,
    odd,
    random_tokens,
    random_weights,
    rounded,
    to_numpy,
)

torch = pytest.importorskip("torch")

from bmojo_edge.torch import Model, load_weights  # noqa: E402

EXACT = 1e-12

# Unit roundoff u of each dtype. The error of a two-layer model, measured over the grid and several seeds, is at most
# 5 u in logits and 22 u in states (scores and SSM states, where differences of like values are squared or summed).
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
LOGITS, STATES = 12, 48


def double(config: Config, weights) -> Model:
    """The model in float64."""
    model = Model(config).double()
    return load_weights(model, {name: w.astype(np.float64) for name, w in weights.items()})


def assert_same(got, ref, n_layers: int) -> None:
    """Logits, state and memory of a float64 run."""
    (logits, state, memory), (ref_logits, ref_state, ref_memory) = got, ref
    assert_close(logits, ref_logits, EXACT, "logits")
    assert_states_close(state, ref_state, EXACT)
    assert_close(memory.scores, ref_memory.scores, EXACT, "scores")
    np.testing.assert_array_equal(to_numpy(memory.eidetic_index), ref_memory.eidetic_index)
    assert memory.eidetic_index.shape[1] == n_layers


@torch.no_grad()
@pytest.mark.parametrize("name", GRID)
def test_float64_equals_the_oracle(name: str) -> None:
    config = GRID[name]
    weights, n = random_weights(config), len(config.layer_types)
    model = double(config, weights)
    tokens = random_tokens(config, 2, 41)
    ref = reference.forward(config, weights, tokens, return_memory=True)
    got = model.forward_with_memory(tokens)
    assert_same(got, ref, n)
    # Rows go on at different positions, and then token by token, one of them with pauses.
    tokens, lengths = random_tokens(config, 2, 23, seed=1), [7, 19]
    ref = reference.forward(config, weights, tokens, ref[1], lengths=lengths, return_memory=True)
    got = model.forward_with_memory(tokens, got[1], lengths=lengths)
    assert_same(got, ref, n)
    state, ref_state = got[1], ref[1]
    for step in range(7):
        token, active = random_tokens(config, 2, 1, seed=2 + step), np.array([True, step % 3 != 1])
        want, ref_state = reference.forward(config, weights, token, ref_state, lengths=active.astype(int))
        logits, state = model.decode_one_token(token[:, 0], state, None if active.all() else active)
        assert_close(logits, want[:, 0], EXACT, f"logits of step {step}")
        assert_states_close(state, ref_state, EXACT)


SEGMENTS = np.array(
    [
        [0] * 17 + [1] * 28,
        [-1] * 4 + [3] * 9 + [-1] * 2 + [3] * 20 + [-1] * 10,  # leading, inner and trailing padding
        [5] * 45,
        [2] * 1 + [4] * 12 + [-1] * 3 + [7] * 2 + [8] * 27,
    ]
)


@torch.no_grad()
@pytest.mark.parametrize("name", GRID)
def test_packed_documents_equal_the_oracle(name: str) -> None:
    config = GRID[name]
    weights, n = random_weights(config), len(config.layer_types)
    model, tokens = double(config, weights), random_tokens(config, 4, 45)
    state, ref_state = None, None
    for lengths in ([45, 45, 30, 41], [3, 20, 0, 17]):  # a row of no tokens keeps its state
        ref = reference.forward(config, weights, tokens, ref_state, SEGMENTS, lengths, return_memory=True)
        got = model.forward_with_memory(tokens, state, SEGMENTS, lengths)
        assert_same(got, ref, n)
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


@torch.no_grad()
@pytest.mark.parametrize("name", ["all", "no ssm", "chunk of one", "chunk is window", "no sinks", "mixed"])
def test_forced_sets_equal_the_oracle(name: str) -> None:
    config = GRID[name]
    weights, tokens = random_weights(config), random_tokens(config, 2, 40)
    model, forced = double(config, weights), random_sets(config, 2, 40)
    for layer, kind in enumerate(config.layer_types):
        if kind != "bmojo":
            forced[:, layer] = -1
    ref = reference.forward(config, weights, tokens, eidetic_index=forced, return_memory=True)
    got = model.forward_with_memory(tokens, eidetic_index=forced)
    assert_same(got, ref, len(config.layer_types))
    # A second call begins inside a chunk, which has its set already: the first forced set is not read.
    cut = 40 - 40 % config.chunk_size if config.chunk_size > 1 else 39
    sets = got[2].eidetic_index[:, :, -1:].expand(-1, -1, -(-9 // config.chunk_size) + 1, -1)
    _, state = model(tokens[:, : cut + 1], eidetic_index=forced)
    _, ref_state = reference.forward(config, weights, tokens[:, : cut + 1], eidetic_index=forced)
    ref = reference.forward(config, weights, tokens[:, :9], ref_state, eidetic_index=to_numpy(sets), return_memory=True)
    got = model.forward_with_memory(tokens[:, :9], state, eidetic_index=sets)
    assert_same(got, ref, len(config.layer_types))


@torch.no_grad()
def test_impossible_sets_are_refused() -> None:
    config = GRID["all"]
    model, forced = double(config, random_weights(config)), random_sets(config, 1, 40)
    for position in (30, 0):  # still in the window of chunk 5; a sink
        forced[0, 0, 5, 0] = position
        with pytest.raises(ValueError, match=f"eidetic_index: position {position} "):
            model(random_tokens(config, 1, 40), eidetic_index=forced)
    with pytest.raises(ValueError, match="eidetic_index: must have shape"):
        model(random_tokens(config, 1, 40), eidetic_index=forced[..., :-1])


def weights_as_stored(config: Config, dtype: str, seed: int) -> dict[str, np.ndarray]:
    """Random weights as a checkpoint of `dtype` holds them: what the scan is made of stays float32."""
    weights = random_weights(config, seed)
    kept = {name: w for name, w in weights.items() if name.endswith((".A_log", ".D", ".dt_proj.bias"))}
    return rounded(weights, dtype) | kept


def chosen(config: Config, scores: np.ndarray, n_chunks: int) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The set of every (row, layer, chunk) by sorting scores (b, n_layers, t)."""
    for index in np.ndindex(*scores.shape[:2], n_chunks):
        limit = min((index[2] + 1) * config.chunk_size - config.window, scores.shape[2])
        eligible = np.arange(config.n_sinks, max(limit, config.n_sinks))
        s = scores[index[:2]][eligible]
        yield index, eligible[np.lexsort((eligible, -s))[: config.n_eidetic]]


@torch.no_grad()
@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("name", GRID)
def test_dtypes(name: str, dtype: str) -> None:
    config, u = GRID[name], ROUNDOFF[dtype]
    weights, tokens = weights_as_stored(config, dtype, 0), random_tokens(config, 2, 41)
    model = load_weights(Model(config.replace(dtype=dtype)), weights)
    assert {p.dtype for name, p in model.named_parameters() if "A_log" not in name} <= {
        getattr(torch, dtype), torch.float32
    }  # fmt: skip
    logits, state, memory = model.forward_with_memory(tokens)
    sets = to_numpy(memory.eidetic_index)
    ref, _, free = reference.forward(config, weights, tokens, return_memory=True)
    if dtype == "float32":
        np.testing.assert_array_equal(sets, free.eidetic_index)
    forced = sets if config.n_eidetic and "bmojo" in config.layer_types else None
    ref, ref_state, ref_memory = reference.forward(config, weights, tokens, eidetic_index=forced, return_memory=True)
    assert logits.dtype == getattr(torch, dtype)
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
    if np.array_equal(sets, free.eidetic_index):
        logits, state = model.decode_one_token(token[:, 0], state)
        assert_close(logits, ref[:, 0], 2 * LOGITS * u, "decoded logits")
        assert_states_close(state, ref_state, STATES * u)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_changes_only_near_ties(dtype: str) -> None:
    """A token kept or dropped against the oracle is within 4 eps of the e-th score (at width 20 some err more)."""
    config, differing = Config.preset("tiny", window=8, chunk=4, n_fading=8, n_eidetic=8), 0
    for seed in range(3):
        weights, tokens = weights_as_stored(config, dtype, seed), random_tokens(config, 2, 60, seed)
        _, _, memory = load_weights(Model(config.replace(dtype=dtype)), weights).forward_with_memory(tokens)
        sets = to_numpy(memory.eidetic_index)
        _, _, ref = reference.forward(config, weights, tokens, eidetic_index=sets, return_memory=True)
        for index, best in chosen(config, ref.scores, sets.shape[2]):
            s, got = ref.scores[index[:2]], sets[index]
            differ = np.setxor1d(got[got >= 0], best)
            differing += len(differ)
            if len(differ):
                assert np.abs(s[differ] / s[best].min() - 1).max() <= 4 * torch.finfo(getattr(torch, dtype)).eps
    assert differing or dtype == "float16"  # bfloat16 does change some


@torch.no_grad()
@pytest.mark.parametrize("name", ["all", "mixed", "yarn", "no rope"])
def test_offset_changes_nothing(name: str) -> None:
    config = GRID[name]
    weights, tokens = random_weights(config), random_tokens(config, 2, 40)
    model = load_weights(Model(config), weights)
    ref, ref_state = model(tokens[:, :37])
    for offset in (10**9, 2**40 - 20):
        got, state = model(tokens[:, :37], model.init_state(2, offset=offset))
        assert_close(got, ref, 2e-6, f"offset {offset}")
        assert torch.equal(state.position, ref_state.position)
        now, now_ref = state, ref_state
        for token in tokens[:, 37:].T:
            (one, now), (one_ref, now_ref) = model.decode_one_token(token, now), model.decode_one_token(token, now_ref)
            assert_close(one, one_ref, 2e-6, f"offset {offset}, decoded")


def test_names_and_shapes_are_the_contract() -> None:
    for config in GRID.values():
        model = Model(config)
        assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == parameter_shapes(config)
        assert all(p.dtype == torch.float32 for p in model.state_dict().values())


@torch.no_grad()
def test_long_sequences_cross_tiles_and_scan_chunks() -> None:
    """Lengths beyond QUERY_TILE and SCAN_STEPS, where the odd sizes above fit in one tile."""
    config = odd("bmojo", "attention", d_model=12, head_dim=4, window=70, n_fading=33, chunk=13, n_eidetic=9, d_ff=0)
    weights, tokens = random_weights(config), random_tokens(config, 2, 300)
    model, segments = double(config, weights), np.repeat([[0, 1, 2]], [150, 9, 141], axis=1).repeat(2, axis=0)
    for labels in (None, segments):
        ref = reference.forward(config, weights, tokens, segment_ids=labels, return_memory=True)
        assert_same(model.forward_with_memory(tokens, segment_ids=labels), ref, 2)
    ref = reference.forward(config, weights, tokens, ref[1], lengths=[300, 131], return_memory=True)
    got = model.forward_with_memory(tokens, model(tokens, segment_ids=segments)[1], lengths=[300, 131])
    assert_same(got, ref, 2)
