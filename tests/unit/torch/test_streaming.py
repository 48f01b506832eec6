"""The PyTorch twin: however tokens arrive, logits and state are the same; and what must not matter does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bmojo_edge.config import Config
from bmojo_edge.state import leaves
from tests.helpers import (
    GRID,
    assert_close,
    assert_states_close,
    assert_states_equal,
    odd,
    random_tokens,
    random_weights,
    take_row,
)

torch = pytest.importorskip("torch")

from bmojo_edge.torch import Model, load_weights  # noqa: E402
from bmojo_edge.torch import model as model_module  # noqa: E402

# float32 against float32 computed in another order: a few times the 5 roundoffs by which each misses the oracle.
CLOSE, STATES = 2e-6, 6e-6
NAMES = ["all", "mixed", "no ssm", "chunk of one", "untied, qk-norm, bias", "mamba"]


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: load_weights(Model(GRID[name]), random_weights(GRID[name])).eval() for name in NAMES}


CALLS = st.lists(
    st.tuples(st.sampled_from(["forward", "prefill", "decode"]), st.integers(0, 25), st.integers(0, 25)),
    min_size=1,
    max_size=10,
)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
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
            logits, state = model(block, state, lengths=take)
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
            ref, ref_state = model(text[r : r + 1, : done[r]])
            for row, position, logits in seen:
                if row == r:  # one token's logits, not a mean over many
                    assert_close(logits, ref[0, position], 5 * CLOSE, f"row {r}, position {position}")
            assert_states_close(take_row(state, r), _grown(ref_state, take_row(state, r)), STATES)


def _grown(old, new):
    """`old` with its growing caches as large as those of `new`, as a batch keeps them."""
    from bmojo_edge.state import map_leaves

    def grow(a, b):
        return torch.nn.functional.pad(a, (0, 0, 0, b.shape[2] - a.shape[2])) if a.dim() == 4 else a

    return map_leaves(grow, old, new)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_prefill_in_blocks_and_decoding_equal_forward(name: str, models: dict[str, Model], monkeypatch) -> None:
    monkeypatch.setattr(model_module, "PREFILL_BLOCK", 11)
    model, config = models[name], GRID[name]
    tokens = random_tokens(config, 3, 47)
    ref, ref_state = model(tokens)
    logits, state = model.prefill(tokens, model.init_state(3))
    assert_close(logits, ref[:, -1], 2 * CLOSE)
    assert_states_close(state, ref_state, STATES)
    lengths = [47, 9, 12]
    logits, state = model.prefill(tokens, model.init_state(3), lengths)
    _, ragged = model(tokens, lengths=lengths)
    for row, n in enumerate(lengths):
        assert_close(logits[row], ref[row, n - 1], 5 * CLOSE)
    assert_states_close(state, ragged, STATES)
    state = model.init_state(3)
    for t in range(47):
        logits, state = model.decode_one_token(tokens[:, t], state)
        assert_close(logits, ref[:, t], 5 * CLOSE, f"token {t}")
    assert_states_close(state, ref_state, STATES)


@torch.no_grad()
@pytest.mark.parametrize("name", GRID)
def test_no_token_sees_the_future(name: str) -> None:
    config = GRID[name]
    model, tokens = load_weights(Model(config), random_weights(config)), random_tokens(config, 1, 40)
    changed = tokens.copy()
    changed[0, 25] = (changed[0, 25] + 1) % config.vocab_size
    a, b = model(tokens)[0], model(changed)[0]
    assert torch.equal(a[:, :25], b[:, :25])
    assert (a[:, 25:] - b[:, 25:]).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["all", "mixed", "no ssm", "experts"])
def test_padding_is_never_read(name: str) -> None:
    """Embeddings that only padding has are NaN: one read of them would show everywhere."""
    config = GRID[name]
    model = load_weights(Model(config), random_weights(config))
    tokens = random_tokens(config, 3, 30) % (config.vocab_size - 1)
    model.embed.weight[-1] = float("nan")
    lengths, segments = [30, 17, 0], np.array([[0] * 12 + [1] * 18, [-1] * 3 + [0] * 8 + [-1] * 4 + [5] * 15, [2] * 30])
    for options in ({"lengths": lengths}, {"segment_ids": segments}, {"segment_ids": segments, "lengths": lengths}):
        padding = np.zeros((3, 30), bool)
        if "lengths" in options:
            padding |= np.arange(30) >= np.array(lengths)[:, None]
        if "segment_ids" in options:
            padding |= segments < 0
        results = []
        for filler in (config.vocab_size - 1, 0, -100, 10**6):
            _, carried = model(tokens[:, :7])
            results.append(model(np.where(padding, filler, tokens), carried, **options))
        for logits, state in results:
            assert torch.isfinite(logits).all()
            assert not logits[torch.from_numpy(padding)].any()
            assert torch.equal(logits, results[0][0])
            assert_states_equal(state, results[0][1])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_are_those_alone(name: str, models: dict[str, Model]) -> None:
    model, config = models[name], GRID[name]
    tokens = random_tokens(config, 1, 60)
    spans = [(0, 21, 4), (21, 22, 9), (25, 41, 9), (41, 60, 4)]  # three columns of padding between equal ids
    segments = np.full((1, 60), -1)
    for begin, end, label in spans:
        segments[0, begin:end] = label
    logits, state = model(tokens, segment_ids=segments)
    for begin, end, _ in spans:
        ref, _ = model(tokens[:, begin:end])
        assert_close(logits[:, begin:end], ref, 2 * CLOSE, f"document {begin} .. {end}")
    _, last = model(tokens[:, 41:60])
    assert_states_close(state, last, STATES)


@torch.no_grad()
def test_a_state_is_a_value(models: dict[str, Model]) -> None:
    """Nothing given is written to, so a fork is a reference kept, and a fork played again gives the same bits."""
    for name in ("all", "mixed"):
        model, config = models[name], GRID[name]
        tokens = random_tokens(config, 2, 40)
        _, state = model(tokens[:, :19])
        before = [(leaf_name, leaf.clone()) for leaf_name, leaf in leaves(state)]
        played = [
            (model(tokens[:, 19:], state), model.decode_one_token(tokens[:, 19], state), model.prefill(tokens, state))
            for _ in range(2)
        ]
        for (leaf_name, old), (_, now) in zip(before, leaves(state), strict=True):
            assert torch.equal(now, old), leaf_name
        for (a, after_a), (b, after_b) in zip(*played, strict=True):
            assert torch.equal(a, b)
            assert_states_equal(after_a, after_b)


@torch.no_grad()
def test_reset_restarts_the_rows_named(models: dict[str, Model]) -> None:
    for name in ("all", "mixed"):
        model, config = models[name], GRID[name]
        tokens = random_tokens(config, 3, 20)
        _, state = model(tokens, model.init_state(3, offset=5))
        restarted = model.reset(state, [True, False, True])
        assert restarted.position.tolist() == [0, 20, 0]
        assert restarted.offset.tolist() == [5, 5, 5]
        assert_states_equal(take_row(restarted, 1), take_row(state, 1))
        got, _ = model(tokens, restarted)
        fresh, _ = model(tokens, model.init_state(3, offset=5))
        on, _ = model(tokens, state)
        assert_close(got[[0, 2]], fresh[[0, 2]], CLOSE)
        assert_close(got[1], on[1], CLOSE)


@torch.no_grad()
def test_rows_at_different_positions_do_not_mix(models: dict[str, Model]) -> None:
    """One row near position 0, one far along: each continues as it would alone."""
    model, config = models["all"], GRID["all"]
    a, b = random_tokens(config, 1, 50)[0], random_tokens(config, 1, 13, seed=1)[0]
    _, state = model(np.stack([a, np.pad(b, (0, 37))]), lengths=[50, 13])
    more = random_tokens(config, 2, 9, seed=2)
    got, _ = model(more, state)
    for row, text in enumerate((a, b)):
        ref, _ = model(np.concatenate([text, more[row]])[None])
        assert_close(got[row], ref[0, -9:], 2 * CLOSE)


@torch.no_grad()
def test_bad_arguments_are_named() -> None:
    config: Config = odd()
    model = Model(config)
    tokens = random_tokens(config, 2, 5)
    for arguments, match in (
        ((tokens[0],), "tokens: must be integers of 2 dimensions"),
        ((tokens.astype(np.float32),), "tokens: must be integers"),
        ((tokens, model.init_state(3)), "state: is of 3 sequences, tokens have 2 rows"),
        ((tokens, None, tokens[:, :4]), r"segment_ids: must be integers of shape \(2, 5\)"),
        ((tokens, None, None, [1, 2, 3]), r"lengths: must be integers of shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            model(*arguments)
