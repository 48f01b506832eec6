"""The MLX mixers mamba2, gdn and gka against the oracle: options, dtypes, lengths, splits, quantised weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bmojo_edge import checkpoint, reference
from bmojo_edge.config import SSM, Config, ConfigError, Quantization
from bmojo_edge.parameters import parameter_shapes
from bmojo_edge.quantize import dequantized, is_quantizable, quantize
from bmojo_edge.state import map_leaves
from tests.helpers import (
    assert_close,
    assert_states_close,
    assert_states_equal,
    random_tokens,
    random_weights,
    rounded,
    take_row,
    to_numpy,
)
from tests.mixers import SSMS, alone, bound, within

mx = pytest.importorskip("mlx.core")

from mlx.utils import tree_flatten  # noqa: E402

from bmojo_edge.mlx import Model, load, load_weights  # noqa: E402
from bmojo_edge.mlx.recurrences import (  # noqa: E402
    delta_rule,
    delta_rule_step,
    linear_attention,
    linear_attention_step,
    ridge_queries,
    ridge_queries_step,
)

PLACES = pytest.mark.parametrize("place", [alone, within])
NAMES = pytest.mark.parametrize("name", SSMS)


def model_of(config: Config, weights) -> Model:
    return load_weights(Model(config), weights)


@NAMES
@PLACES
def test_parameters_are_the_contract(name, place):
    config = place(name)
    flat: Any = tree_flatten(Model(config).parameters())
    assert {key: value.shape for key, value in flat} == parameter_shapes(config)


@NAMES
@PLACES
def test_logits_state_and_splits(name, place):
    config = place(name)
    weights, tokens = random_weights(config), random_tokens(config, 2, 70)
    model, limit = model_of(config, weights), bound(config)
    want, final = reference.forward(config, weights, tokens)
    got, state = model.forward(tokens, model.init_state(2))
    assert_close(got, want, limit)
    assert_states_close(state, final, limit)

    state, parts = model.init_state(2), []
    for column in tokens[:, :3].T:
        logits, state = model.decode_one_token(column, state)
        mx.eval(logits, state)
        parts.append(logits[:, None])
    for part in np.split(tokens[:, 3:], [1, 64], axis=1):
        logits, state = model.forward(part, state)
        parts.append(logits)
    assert_close(mx.concatenate(parts, axis=1), want, limit)
    assert_states_close(state, final, limit)


@pytest.mark.parametrize("name", ["mamba2", "gdn", "gka", "gka, H keeps everything"])
def test_every_length_over_chunk_borders(name):
    config, lengths = alone(name), np.array([1, 2, 63, 64, 65, 128, 129, 300])
    weights, tokens = random_weights(config), random_tokens(config, 1, 300)
    model, state, want, wants, begin = model_of(config, weights), None, [], {}, 0
    for end in lengths:
        part, state = reference.forward(config, weights, tokens[:, begin:end], state)
        want, begin = [*want, part], end
        wants[end] = state
    whole = np.concatenate(want, axis=1)
    got, states = model.forward(np.repeat(tokens, len(lengths), axis=0), model.init_state(len(lengths)), lengths)
    for row, length in enumerate(lengths):
        assert_close(got[row, : int(length)], whole[0, :length], bound(config), f"length {length}")
        logits, one = model.prefill(tokens[:, :length], model.init_state(1))
        assert_close(logits, whole[:, length - 1], bound(config), f"length {length}")
        assert_states_close(one, wants[length], bound(config))
    assert_states_close(
        states, map_leaves(lambda *rows: np.concatenate(rows), *(wants[n] for n in lengths)), bound(config)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["mamba2", "mamba2, few heads of x and B, their norms", "gdn", "gka"])
def test_half_precision(name, dtype):
    config = alone(name, dtype=dtype)
    weights, tokens = rounded(random_weights(config), dtype), random_tokens(config, 2, 70)
    want, final = reference.forward(config, weights, tokens)
    model = model_of(config, weights)
    got, state = model.forward(tokens, model.init_state(2))
    assert got.dtype == getattr(mx, dtype)
    assert state.layers[0][1].dtype == mx.float32
    assert_close(got, want, bound(config, dtype))
    assert_states_close(state, final, bound(config, dtype))
    token = tokens[:, 0]
    assert_close(
        model.decode_one_token(token, state)[0],
        reference.forward(config, weights, token[:, None], final)[0][:, 0],
        bound(config, dtype),
    )


@NAMES
def test_inactive_rows_keep_their_state(name):
    config = alone(name)
    model, tokens = model_of(config, random_weights(config)), random_tokens(config, 2, 9)
    state = model.forward(tokens, model.init_state(2))[1]
    moved = model.decode_one_token(tokens[:, 0], state, active=[False, True])[1]
    both = model.decode_one_token(tokens[:, 0], state)[1]
    assert_states_equal(take_row(moved, 0), take_row(state, 0))
    assert_states_equal(take_row(moved, 1), take_row(both, 1))


@pytest.mark.parametrize("kind", ["mamba2", "gdn", "gka"])
def test_quantised_weights(kind):
    config = Config(
        vocab_size=37, d_model=64, layer_types=(kind,), n_heads=2, ssm=SSM(kind=kind, head_dim=32),
        quantization=Quantization(group_size=32, bits=8),
    )  # fmt: skip
    stored, rule = {}, config.quantization
    for key, w in random_weights(config).items():
        if rule is not None and is_quantizable(key, w.shape, rule):
            owner = key.removesuffix(".weight")
            stored |= dict(zip((key, f"{owner}.scales", f"{owner}.biases"), quantize(w, rule), strict=True))
        else:
            stored[key] = w
    assert any(key.endswith("scales") and "mixer" in key for key in stored)
    assert "layers.0.mixer.b_proj.scales" not in stored
    model, tokens = model_of(config, stored), random_tokens(config, 1, 20)
    plain = config.replace(quantization=None)
    want, final = reference.forward(plain, dequantized(stored, rule), tokens)
    got, state = model.forward(tokens[:, :-1], model.init_state(1))
    last, state = model.decode_one_token(tokens[:, -1], state)
    assert_close(mx.concatenate([got, last[:, None]], axis=1), want, bound(plain))
    assert_states_close(state, final, bound(plain))


@PLACES
def test_load_changes_the_steps_of_the_solver(place, tmp_path):
    config = place("gka")
    weights, tokens = random_weights(config), random_tokens(config, 1, 12)
    checkpoint.save(tmp_path / "model", config, weights)
    want = [reference.forward(c, weights, tokens)[0] for c in (config, config.with_num_iter(3))]
    assert np.abs(want[0] - want[1]).max() > 1e-3
    for steps, ref in ((None, want[0]), (3, want[1])):
        model = load(tmp_path / "model", num_iter=steps)
        assert_close(model.forward(tokens)[0], ref, bound(config))
    checkpoint.save(tmp_path / "other", alone("gdn"), random_weights(alone("gdn")))
    with pytest.raises(ConfigError, match="num_iter"):
        load(tmp_path / "other", num_iter=3)


# --- recurrences by themselves ----------------------------------------------------------------------------------------


def recurrence_inputs(t):
    rng = np.random.default_rng(t)
    b, h, n, p = 2, 3, 5, 4
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rng.standard_normal((2, b, t, h, n)))
    v, beta = rng.standard_normal((b, t, h, p)), 2 * rng.random((b, t, h))
    g = -rng.random((b, t, h)) * [0.01, 1.0, 60.0]
    return [mx.array(x.astype(np.float32)) for x in (q, k, v, g, beta, rng.standard_normal((b, h, p, n)))]


def by_step(step, inputs, state):
    out = []
    for i in range(inputs[0].shape[1]):
        o, state = step(*(x[:, i] for x in inputs), state)
        out.append(o)
    return mx.stack(out, axis=1), state


@pytest.mark.parametrize("t", [1, 2, 63, 64, 65, 129, 200])
def test_chunks_are_the_steps(t):
    q, k, v, g, beta, S = recurrence_inputs(t)
    H = mx.swapaxes(S, -1, -2) @ S
    cases = [
        (linear_attention, linear_attention_step, (q, k, v, g), S, ()),
        (delta_rule, delta_rule_step, (q, k, v, g, beta), S, ()),
        (ridge_queries, ridge_queries_step, (q, k, g), H, (0.02, 30)),
    ]
    for whole, step, inputs, start, options in cases:
        want, end = by_step(lambda *a, step=step, options=options: step(*a, *options), inputs, start)
        got, state = whole(*inputs, start, *options)
        assert_close(got, want, 3e-6, whole.__name__)
        assert_close(state, end, 3e-6, whole.__name__)


@pytest.mark.parametrize("t", [1, 5, 70])
def test_mlx_s_own_delta_rule_is_ours(t):
    q, k, v, g, beta, S = recurrence_inputs(t)
    want, end = delta_rule(q, k, v, g, beta, S)
    got, state = mx.fast.gated_delta_update(q, k, v, mx.exp(g), beta, S)
    assert_close(got, want, 3e-6)
    assert_close(state, end, 3e-6)


def test_nothing_remembered_reads_zero():
    zero = mx.zeros((1, 3, 1, 4))
    x, H = ridge_queries(mx.ones((1, 3, 1, 4)), zero, mx.zeros((1, 3, 1)), mx.zeros((1, 1, 4, 4)), 0.02, 30)
    assert not to_numpy(x).any() and not to_numpy(H).any()
