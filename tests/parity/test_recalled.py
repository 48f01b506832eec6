"""Blocks recalled from storage as one more memory: both twins against the float64 oracle, and what the oracle means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bmojo_edge import reference
from bmojo_edge.config import Config
from bmojo_edge.engine import as_engine, to_host
from bmojo_edge.recall import shape_for
from bmojo_edge.reference_memory import rotate
from bmojo_edge.rope import turns_per_token
from bmojo_edge.state import ELSEWHERE, RecalledState, State
from bmojo_edge.storage_blocks import Shape, blocks_of, packed, unpacked
from bmojo_edge.storage_index import block_scores
from tests.helpers import GRID, assert_close, assert_states_close, odd, random_tokens, random_weights, to_numpy
from tests.twins import ENGINES, build

CASES = ["all", "no rope", "no sinks", "no eidetic", "no ssm", "ring alone", "untied, qk-norm, bias", "chunk of one",
         "window of one", "many sinks", "mixed"]  # fmt: skip
BOUND = 2e-5


def with_storage(config: Config, state: State, rows: int, slots: int = 7, span: int = 3) -> State:
    """A state (of NumPy arrays) in which bmojo layers recall random tokens: foreign ones, own ones, empty slots."""
    rng = np.random.default_rng(3)
    shape = (rows, config.kv_heads, slots, config.d_head)
    positions = np.array([ELSEWHERE, 2, 3, -1, 4, ELSEWHERE, 5])[:slots]
    layers = list(state.layers)
    for i, kind in enumerate(config.layer_types):
        if kind == "bmojo":
            recalled = RecalledState(
                rng.standard_normal(shape), rng.standard_normal(shape), np.tile(positions, (rows, 1))
            )
            queries = np.zeros((rows, span, config.n_heads * config.d_head))
            layers[i] = layers[i]._replace(recalled=recalled, queries=queries)
    return state._replace(layers=tuple(layers))


def on_engine(state: State, like: Any) -> State:
    """The same storage in the state of a twin."""
    layers = []
    for ours, theirs in zip(state.layers, like.layers, strict=True):
        if getattr(ours, "recalled", ()):
            k, v = (as_engine(x.astype(np.float32), theirs.window.k) for x in ours.recalled[:2])
            recalled = RecalledState(k, v, as_engine(ours.recalled.positions, theirs.window.k))
            queries = as_engine(ours.queries.astype(np.float32), theirs.window.k)
            theirs = theirs._replace(recalled=recalled, queries=queries)
        layers.append(theirs)
    return like._replace(layers=tuple(layers))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_twins_agree_with_the_oracle(name: str, engine: str) -> None:
    config, b = GRID[name], 2
    weights, tokens = random_weights(config), random_tokens(config, b, 25)
    state = with_storage(config, reference.init_state(config, b), b)
    ref, ref_state = reference.forward(config, weights, tokens, state)
    model = build(engine, config, weights)
    got_state = on_engine(state, model.init_state(b))
    got = []
    for begin, end in ((0, 5), (5, 18)):  # fresh, carried, then token by token
        logits, got_state = model.forward(tokens[:, begin:end], got_state)
        got.append(to_numpy(logits))
    for t in range(18, 25):
        logits, got_state = model.decode_one_token(tokens[:, t], got_state)
        got.append(to_numpy(logits)[:, None])
    assert_close(np.concatenate(got, axis=1), ref, BOUND, "logits")
    assert_states_close(got_state, ref_state, BOUND)
    plain, _ = reference.forward(config, weights, tokens)
    assert np.abs(plain - ref).max() > 1e-3  # the blocks are read at all


def test_a_recalled_token_weighs_as_it_would_at_the_distance_of_the_window() -> None:
    """One layer, one query, by hand: a foreign token, and one that the window holds as well."""
    config = GRID["ring alone"].replace(layer_types=("bmojo",), d_ff=0)
    weights = random_weights(config)
    state = with_storage(config, reference.init_state(config, 1), 1, slots=1)
    token = random_tokens(config, 1, 1)
    captured: dict[str, Any] = {}

    def observe(layer: int, row: int, begin: int, out: np.ndarray) -> None:
        captured["out"] = out

    reference.forward(config, weights, token, state, observe=observe)
    h = weights["embed.weight"][token[0]].astype(np.float64)
    u = h / np.sqrt((h**2).mean(-1, keepdims=True) + config.norm_eps) * weights["layers.0.norm.weight"]

    def heads(name: str, n: int) -> np.ndarray:
        return (u @ weights[f"layers.0.mixer.{name}_proj.weight"].T).reshape(1, n, config.d_head)

    q, k, v = heads("q", config.n_heads), heads("k", config.kv_heads), heads("v", config.kv_heads)
    turns, recalled = turns_per_token(config), state.layers[0].recalled
    at = np.array([config.window])
    group = config.n_heads // config.kv_heads
    out = []
    for head in range(config.n_heads):
        g = head // group
        # The token itself at distance 0, the recalled one as if `window` tokens back.
        scores = np.array([q[0, head] @ k[0, g], rotate(q, at, turns)[0, head] @ recalled.k[0, g, 0]])
        share = np.exp(scores / np.sqrt(config.d_head))
        share /= share.sum()
        out.append(share[0] * v[0, g] + share[1] * recalled.v[0, g, 0])
    want = h + np.concatenate(out) @ weights["layers.0.mixer.o_proj.weight"].T
    np.testing.assert_allclose(captured["out"], want, rtol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_window_holds_comes_out_unrotated(engine: str) -> None:
    """Keys of the first layer, which follow from the tokens alone, whatever the position and the offset."""
    config = GRID["ring alone"]
    model = build(engine, config, random_weights(config))
    tokens = random_tokens(config, 1, 6)
    _, near = model.forward(tokens, model.init_state())
    _, far = model.forward(tokens, model.init_state(offset=10**9))
    ref = model.window_tokens(near, 0, 6, [0])
    assert ref.shape == (1, 2, 1, config.kv_heads, 6, config.d_head)
    assert_close(model.window_tokens(far, 0, 6, [0]), ref, BOUND)
    weights = random_weights(config)
    h = weights["embed.weight"][tokens[0]].astype(np.float64)
    u = h / np.sqrt((h**2).mean(-1, keepdims=True) + config.norm_eps) * weights["layers.0.norm.weight"]
    for kind, name in enumerate("kv"):
        want = (u @ weights[f"layers.0.mixer.{name}_proj.weight"].T).reshape(6, config.kv_heads, config.d_head)
        assert_close(ref[0, kind, 0], want.transpose(1, 0, 2), BOUND, name)


# --- blocks as bytes

KEPT = {"sinks": odd(window=16, chunk=4, ssm=None, n_eidetic=3, n_sinks=3), "no rope": odd(window=16, rope_theta=None),
        "mixed": odd("bmojo", "attention", "bmojo", window=16, attention_window=(None, 5, None))}  # fmt: skip


def check_bytes(model: Any, config: Config, shape: Shape) -> None:
    """Blocks that a twin makes and reads, against NumPy's from the same window: whole, cut, wrapped around the ring."""
    tokens, state, fed = random_tokens(config, 2, 40), model.init_state(2, offset=5), 0
    kept = list(dict.fromkeys((*shape.layers, shape.router)))
    for end, begin, count in ((3, 0, 3), (13, 4, 9), (25, 16, 9), (40, 24, 16)):
        _, state = model.forward(tokens[:, fed:end], state)
        fed, skip = end, max(config.n_sinks - begin, 0)
        want = packed(model.window_tokens(state, begin, count, kept), shape, skip)
        np.testing.assert_array_equal(to_host(model.window_blocks(state, begin, count, shape))(), want)
        assert blocks_of(want, shape).payloads.any()
        payloads = blocks_of(want, shape).payloads.reshape(2, -1, shape.payload_bytes)
        found, ref = model.recalled_blocks(payloads, shape), unpacked(payloads, shape)
        assert len(found) == 2 * len(shape.layers)
        for got, array in zip(found, ref.reshape(-1, *ref.shape[2:]), strict=True):
            like = as_engine(array, got)
            like = like.to(got.dtype) if hasattr(like, "to") else like.astype(got.dtype)
            np.testing.assert_array_equal(to_numpy(got), to_numpy(like))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", KEPT)
def test_a_twins_blocks_are_numpys_bit_for_bit(name: str, engine: str, dtype: str) -> None:
    config = KEPT[name].replace(dtype=dtype)
    model, shape = build(engine, config, random_weights(config)), shape_for(config, block=4)
    assert model.config.dtype == dtype
    check_bytes(model, config, shape)
    check_bytes(model, config, shape._replace(layers=shape.layers[-1:], router=shape.layers[0], pool=4))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpus_blocks_are_numpys_bit_for_bit(dtype: str) -> None:
    config = KEPT["sinks"].replace(dtype=dtype)
    model = build("torch", config, random_weights(config)).cuda()
    check_bytes(model, config, shape_for(config, block=4))


def test_the_scorer_of_a_gpu_computes_what_numpy_does() -> None:
    torch, rng = pytest.importorskip("torch"), np.random.default_rng(0)
    from bmojo_edge.torch.recalled import scores_of_blocks

    queries, summaries = rng.standard_normal((6, 3, 8)).astype("f4"), rng.standard_normal((150, 4, 2, 8)).astype("f2")
    got = scores_of_blocks(torch.from_numpy(queries), torch.from_numpy(summaries)).numpy()
    np.testing.assert_allclose(got, block_scores(queries, summaries), rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
def test_a_gpu_scores_blocks_as_numpy_does() -> None:
    config, rng = KEPT["sinks"], np.random.default_rng(0)
    scorer = build("torch", config, random_weights(config)).cuda().block_scorer()
    queries, summaries = rng.standard_normal((6, 3, 8)).astype("f4"), rng.standard_normal((50, 4, 2, 8)).astype("f2")
    np.testing.assert_allclose(scorer(queries, summaries), block_scores(queries, summaries), rtol=1e-4, atol=1e-5)
