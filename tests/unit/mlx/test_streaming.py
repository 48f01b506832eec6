"""The MLX twin: however tokens arrive, logits and state are the same; and what must not matter does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bmojo_edge.state import leaves, map_leaves, state_spec
from tests.helpers import (
    GRID,
    assert_close,
    assert_states_close,
    assert_states_equal,
    odd,
    random_tokens,
    random_weights,
    take_row,
    to_numpy,
)

mx = pytest.importorskip("mlx.core")

from bmojo_edge.config import Config  # noqa: E402
from bmojo_edge.mlx import Model, load_weights  # noqa: E402
from bmojo_edge.mlx import model as model_module  # noqa: E402

# float32 against float32 computed in another order: a few times the roundoffs by which each misses the oracle.
CLOSE, STATES = 2e-6, 6e-6
NAMES = ["all", "mixed", "no ssm", "chunk of one", "untied, qk-norm, bias", "mamba"]


def model_of(config: Config) -> Model:
    return load_weights(Model(config), random_weights(config))


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: model_of(GRID[name]) for name in NAMES}


CALLS = st.lists(
    st.tuples(st.sampled_from(["forward", "prefill", "decode"]), st.integers(0, 25), st.integers(0, 25)),
    min_size=1,
    max_size=10,
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(calls=CALLS)
@example(calls=[("decode", 1, 1)] * 30 + [("prefill", 8, 3), ("decode", 0, 1), ("forward", 1, 0), ("decode", 1, 1)])
def test_any_split_of_ragged_rows(name: str, models: dict[str, Model], calls: list[tuple[str, int, int]]) -> None:
    """Two rows advance by different amounts per call, through forward, prefill or decoding, some calls not at all."""
    model, config = models[name], GRID[name]
    text, state, done = random_tokens(config, 2, 250), model.init_state(2), [0, 0]
    seen: list[tuple[int, int, Any]] = []  # row, position, logits
    for kind, *take in calls:
        take = [min(n, 1) for n in take] if kind == "decode" else take
        block = np.full((2, max(*take, 1)), config.vocab_size + 7)  # padding no embedding has
        for r in (0, 1):
            block[r, : take[r]] = text[r, done[r] : done[r] + take[r]]
        before = state
        if kind == "decode":
            logits, state = model.decode_one_token(block[:, 0], state, np.array(take) > 0)
        elif kind == "prefill":
            logits, state = model.prefill(block, state, take)
        else:
            logits, state = model.forward(block, state, lengths=take)
        logits = to_numpy(logits)
        for r in (0, 1):
            if not take[r]:
                assert not logits[r].any()
                assert_states_equal(take_row(state, r), take_row(_grown(before, state), r))
            elif kind == "forward":
                seen += [(r, done[r] + i, logits[r, i]) for i in range(take[r])]
            else:
                seen.append((r, done[r] + take[r] - 1, logits[r]))
            done[r] += take[r]
    for r in (0, 1):
        if done[r]:
            ref, ref_state = model.forward(text[r : r + 1, : done[r]])
            ref = to_numpy(ref)
            for row, position, logits in seen:
                if row == r:  # one token's logits, not a mean over many
                    assert_close(logits, ref[0, position], 5 * CLOSE, f"row {r}, position {position}")
            assert_states_close(take_row(state, r), _grown(ref_state, take_row(state, r)), STATES)


def _grown(old, new):
    """`old` with its growing caches as large as those of `new`, as a batch keeps them."""

    def grow(a, b):
        return mx.pad(a, [(0, 0), (0, 0), (0, b.shape[2] - a.shape[2]), (0, 0)]) if a.ndim == 4 else a

    return map_leaves(grow, old, new)


@pytest.mark.parametrize("name", NAMES)
def test_prefill_in_blocks_and_decoding_equal_forward(name: str, models: dict[str, Model], monkeypatch) -> None:
    monkeypatch.setattr(model_module, "PREFILL_BLOCK", 11)
    model, config = models[name], GRID[name]
    tokens = random_tokens(config, 3, 47)
    ref, ref_state = model.forward(tokens)
    logits, state = model.prefill(tokens, model.init_state(3))
    assert_close(logits, ref[:, -1], 2 * CLOSE)
    assert_states_close(state, ref_state, STATES)
    lengths = [47, 9, 12]
    logits, state = model.prefill(tokens, model.init_state(3), lengths)
    _, ragged = model.forward(tokens, lengths=lengths)
    for row, n in enumerate(lengths):
        assert_close(logits[row], ref[row, n - 1], 5 * CLOSE)
    assert_states_close(state, ragged, STATES)
    state = model.init_state(3)
    for t in range(47):
        logits, state = model.decode_one_token(tokens[:, t], state)
        assert_close(logits, ref[:, t], 5 * CLOSE, f"token {t}")
    assert_states_close(state, ref_state, STATES)


def test_prefill_blocks_lie_on_the_grid_of_chunks(monkeypatch) -> None:
    config = GRID["all"]
    model, blocks = model_of(config), []
    hidden = model.hidden
    monkeypatch.setattr(model_module, "PREFILL_BLOCK", 10)
    monkeypatch.setattr(
        Model, "hidden", lambda self, tokens, *rest: (blocks.append(tokens.shape[1]), hidden(tokens, *rest))[1]
    )
    _, state = model.prefill(random_tokens(config, 1, 5), model.init_state())
    model.prefill(random_tokens(config, 1, 40), state)
    assert blocks == [5, 10, 12, 12, 6]  # 12 is the next multiple of 3; the second call begins at position 5


@pytest.mark.parametrize("name", GRID)
def test_no_token_sees_the_future(name: str) -> None:
    config = GRID[name]
    model, tokens = model_of(config), random_tokens(config, 1, 40)
    changed = tokens.copy()
    changed[0, 25] = (changed[0, 25] + 1) % config.vocab_size
    a, b = (to_numpy(model.forward(x)[0]) for x in (tokens, changed))
    np.testing.assert_array_equal(a[:, :25], b[:, :25])
    assert np.abs(a[:, 25:] - b[:, 25:]).max() > 1e-4


@pytest.mark.parametrize("name", ["all", "mixed", "no ssm", "experts"])
def test_padding_is_never_read(name: str) -> None:
    """Embeddings that only padding has are NaN: one read of them would show everywhere."""
    config = GRID[name]
    weights, lengths = random_weights(config), [30, 17, 0]
    weights["embed.weight"][-1] = np.nan
    model, tokens = load_weights(Model(config), weights), random_tokens(config, 3, 30) % (config.vocab_size - 1)
    padding, results = np.arange(30) >= np.array(lengths)[:, None], []
    _, carried = model.forward(tokens[:, :7])
    for filler in (config.vocab_size - 1, 0, -100, 10**6):
        padded = np.where(padding, filler, tokens)
        results.append((*model.forward(padded, carried, lengths), model.prefill(padded, carried, lengths)[0]))
    for logits, state, last in results:
        assert np.isfinite(to_numpy(logits)).all()
        assert not to_numpy(logits)[padding].any()
        assert_states_equal((logits, last), (results[0][0], results[0][2]))
        assert_states_equal(state, results[0][1])
    for filler in (config.vocab_size - 1, -100, 10**6):
        logits, state = model.decode_one_token(np.array([1, filler, 2]), carried, [True, False, True])
        assert np.isfinite(to_numpy(logits)).all()
        assert_states_equal(take_row(state, 1), take_row(carried, 1))


@pytest.mark.parametrize("name", ["all", "mixed"])
def test_rows_are_those_alone(name: str, models: dict[str, Model]) -> None:
    """Each row of a ragged batch through prefill and decoding is the row by itself."""
    model, config = models[name], GRID[name]
    text, lengths = random_tokens(config, 3, 40), [23, 5, 31]
    logits, state = model.prefill(text[:, :31], model.init_state(3), lengths)
    batch = [logits]
    for i in range(9):
        logits, state = model.decode_one_token(np.array([text[r, n + i] for r, n in enumerate(lengths)]), state)
        batch.append(logits)
    for r, n in enumerate(lengths):
        logits, alone = model.prefill(text[r : r + 1, :n], model.init_state())
        for i in range(10):
            assert_close(batch[i][r : r + 1], logits, 5 * CLOSE, f"row {r}, token {i}")
            if i < 9:
                logits, alone = model.decode_one_token(text[r : r + 1, n + i], alone)
        assert_states_close(take_row(state, r), _grown(alone, take_row(state, r)), STATES)


def test_a_state_is_a_value(models: dict[str, Model]) -> None:
    """Nothing given is written to, so a fork is a reference kept, and a fork played again gives the same bits."""
    for name in ("all", "mixed"):
        model, config = models[name], GRID[name]
        tokens = random_tokens(config, 2, 40)
        _, state = model.forward(tokens[:, :19])
        mx.eval(state)
        before = [(leaf, np.array(x)) for leaf, x in leaves(state)]
        played = [
            (
                model.forward(tokens[:, 19:], state),
                model.decode_one_token(tokens[:, 19], state),
                model.decode_one_token(tokens[:, 19], state, [False, True]),
                model.prefill(tokens, state),
            )
            for _ in range(2)
        ]
        mx.eval(played)
        for (leaf, old), (_, now) in zip(before, leaves(state), strict=True):
            np.testing.assert_array_equal(np.array(now), old, err_msg=leaf)
        assert_states_equal(*played)


def test_reset_restarts_the_rows_named(models: dict[str, Model]) -> None:
    for name in ("all", "mixed"):
        model, config = models[name], GRID[name]
        tokens = random_tokens(config, 3, 20)
        _, state = model.forward(tokens, model.init_state(3, offset=5))
        restarted = model.reset(state, [True, False, True])
        assert_states_equal(take_row(restarted, 1), take_row(state, 1))
        assert restarted.offset.tolist() == [5, 5, 5]
        fresh = _grown(model.init_state(1, offset=5), take_row(restarted, 0))
        assert_states_equal(take_row(restarted, 0), fresh)
        logits, _ = model.forward(tokens, restarted)
        alone, _ = model.forward(tokens[:1])
        assert_close(logits[:1], alone, CLOSE)


def test_state_shapes_are_the_specification(models: dict[str, Model]) -> None:
    for name, model in models.items():
        config = GRID[name]
        _, state = model.forward(random_tokens(config, 2, 300))
        for made, length in ((model.init_state(2), 0), (state, 300)):
            for (leaf, x), (_, spec) in zip(leaves(made), leaves(state_spec(config, 2, length)), strict=True):
                assert (x.shape, x.dtype) == (spec.shape, getattr(mx, spec.dtype)), f"{name}: {leaf}"
            assert sum(x.nbytes for _, x in leaves(made)) == config.state_bytes(2, length)


def test_prefill_memory_does_not_grow_with_the_prompt() -> None:
    config = odd("bmojo", "mamba", d_model=32, head_dim=16, window=64, n_fading=64, chunk=16, n_eidetic=32)
    model, peaks = model_of(config), []
    for t in (2048, 8192):
        tokens = random_tokens(config, 1, t)
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(model.prefill(tokens, model.init_state()))
        peaks.append(mx.get_peak_memory() - 8 * t)
    assert peaks[1] < 1.1 * peaks[0]


def test_bad_input_is_named() -> None:
    config = GRID["all"]
    model = model_of(config)
    state = model.init_state(2)
    for tokens, options, match in (
        ([1, 2, 3], {}, r"tokens: must have shape \(b, t\)"),
        (np.zeros((2, 0), int), {}, r"tokens: must have shape"),
        ([[1.0], [2.0]], {}, "tokens: must be integers"),
        ([[1, 99], [1, 2]], {}, "tokens: 99 is not one of the model's 37 tokens"),
        ([[1, 2], [-1, 2]], {}, "tokens: -1 is not one"),
        ([[1, 2]], {}, "state: is of 2 sequences, tokens have 1 rows"),
        ([[1, 2], [1, 2]], {"lengths": [1, 3]}, "lengths: must be 2 integers between 0 and 2"),
        ([[1, 2], [1, 2]], {"lengths": [1]}, "lengths: must be 2 integers"),
    ):
        for call in (model.forward, model.prefill):
            with pytest.raises(ValueError, match=match):
                call(tokens, state, **options)
    for token, active, match in (
        ([1, 99], None, "token: 99 is not one"),
        ([[1], [2]], None, "token: must be integers of 1 dimensions"),
        ([1], None, "state: is of 2 sequences"),
        ([1, 2], [True], "active: must be 2 truth values"),
    ):
        with pytest.raises(ValueError, match=match):
            model.decode_one_token(token, state, active)
