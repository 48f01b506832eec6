"""The torch mixers mamba2, gdn and gka against the oracle: options, dtypes, lengths, splits, documents, gradients."""

from __future__ import annotations

import numpy as np
import pytest

from bmojo_edge import checkpoint, reference
from bmojo_edge.config import Config, ConfigError
from bmojo_edge.state import map_leaves
from tests.helpers import (
    assert_close,
    assert_states_close,
    assert_states_equal,
    random_tokens,
    random_weights,
    rounded,
    take_row,
)
from tests.mixers import SSMS, alone, bound, within

torch = pytest.importorskip("torch")

from bmojo_edge.torch import Model, load, load_weights  # noqa: E402
from bmojo_edge.torch.recurrences import (  # noqa: E402
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
    return load_weights(Model(config), weights).eval()


@torch.no_grad()
@NAMES
@PLACES
def test_logits_state_splits_and_documents(name, place):
    config = place(name)
    weights, tokens = random_weights(config), random_tokens(config, 2, 70)
    model, limit = model_of(config, weights), bound(config)
    want, final = reference.forward(config, weights, tokens)
    got, state = model(tokens)
    assert_close(got, want, limit)
    assert_states_close(state, final, limit)

    state, parts = model.init_state(2), []
    for column in tokens[:, :3].T:
        logits, state = model.decode_one_token(column, state)
        parts.append(logits[:, None])
    for part in np.split(tokens[:, 3:], [1, 64], axis=1):
        logits, state = model(part, state)
        parts.append(logits)
    assert_close(torch.cat(parts, dim=1), want, limit)
    assert_states_close(state, final, limit)

    segments = np.repeat([[0, 1, 2, 3]], [21, 12, 1, 36], axis=1).repeat(2, axis=0)
    lengths = np.array([33, 66])
    want, final = reference.forward(config, weights, tokens, None, segments, lengths)
    got, state = model(tokens, segment_ids=segments, lengths=lengths)
    assert_close(got, want, limit)
    assert_states_close(state, final, limit)


@torch.no_grad()
@NAMES
def test_every_length_over_chunk_borders(name):
    config, lengths = alone(name), np.array([1, 2, 63, 64, 65, 128, 129, 300])
    weights, tokens = random_weights(config), random_tokens(config, 1, 300)
    model, state, want, wants, begin = model_of(config, weights), None, [], {}, 0
    for end in lengths:
        part, state = reference.forward(config, weights, tokens[:, begin:end], state)
        want, begin = [*want, part], end
        wants[end] = state
    got, states = model(np.repeat(tokens, len(lengths), axis=0), lengths=lengths)
    for row, length in enumerate(lengths):
        assert_close(got[row, :length], np.concatenate(want, axis=1)[0, :length], bound(config), f"length {length}")
        one = model(tokens[:, :length])
        assert_close(one[0], np.concatenate(want, axis=1)[:, :length], bound(config), f"length {length}")
        assert_states_close(one[1], wants[length], bound(config))
    assert_states_close(
        states, map_leaves(lambda *rows: np.concatenate(rows), *(wants[length] for length in lengths)), bound(config)
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["mamba2", "mamba2, few heads of x and B, their norms", "gdn", "gka"])
def test_half_precision(name, dtype):
    config = alone(name, dtype=dtype)
    weights, tokens = rounded(random_weights(config), dtype), random_tokens(config, 2, 70)
    want, final = reference.forward(config, weights, tokens)
    model = model_of(config, weights)
    got, state = model(tokens)
    assert got.dtype == getattr(torch, dtype)
    assert state.layers[0][1].dtype == torch.float32
    assert_close(got, want, bound(config, dtype))
    assert_states_close(state, final, bound(config, dtype))
    token = tokens[:, 0]
    assert_close(
        model.decode_one_token(token, state)[0],
        reference.forward(config, weights, token[:, None], final)[0][:, 0],
        bound(config, dtype),
    )


@torch.no_grad()
@NAMES
def test_inactive_rows_keep_their_state(name):
    config = alone(name)
    model, tokens = model_of(config, random_weights(config)), random_tokens(config, 2, 9)
    _, state = model(tokens)
    _, moved = model.decode_one_token(tokens[:, 0], state, active=[False, True])
    _, both = model.decode_one_token(tokens[:, 0], state)
    assert_states_equal(take_row(moved, 0), take_row(state, 0))
    assert_states_equal(take_row(moved, 1), take_row(both, 1))


@torch.no_grad()
@PLACES
def test_load_changes_the_steps_of_the_solver(place, tmp_path):
    config = place("gka")
    weights, tokens = random_weights(config), random_tokens(config, 1, 12)
    checkpoint.save(tmp_path / "model", config, weights)
    want = [reference.forward(c, weights, tokens)[0] for c in (config, config.with_num_iter(3))]
    assert np.abs(want[0] - want[1]).max() > 1e-3
    for steps, ref in ((None, want[0]), (3, want[1])):
        model = load(tmp_path / "model", num_iter=steps)
        assert_close(model(tokens)[0], ref, bound(config))
    checkpoint.save(tmp_path / "other", alone("gdn"), random_weights(alone("gdn")))
    with pytest.raises(ConfigError, match="num_iter"):
        load(tmp_path / "other", num_iter=3)


@pytest.mark.cuda
@torch.no_grad()
@NAMES
@PLACES
def test_on_a_gpu(name, place):
    config = place(name)
    weights, tokens = random_weights(config), random_tokens(config, 2, 150)
    model = model_of(config, weights).cuda()
    want, final = reference.forward(config, weights, tokens)
    got, state = model(tokens[:, :-1])
    last, state = model.decode_one_token(tokens[:, -1], state)
    assert_close(torch.cat([got, last[:, None]], dim=1), want, bound(config))
    assert_states_close(state, final, bound(config))


@NAMES
@PLACES
def test_gradients_are_the_derivative_of_the_oracle(name, place):
    config = place(name, n_eidetic=0, window=3)
    weights, tokens = random_weights(config), random_tokens(config, 1, 14)
    segments = np.array([[0] * 9 + [1] * 5])
    rng = np.random.default_rng(3)
    probe = rng.standard_normal((1, 14, config.vocab_size))
    model = model_of(config, weights).double()
    (model(tokens, segment_ids=segments)[0] * torch.tensor(probe)).sum().backward()
    slope, direction = 0.0, {}
    for key, parameter in model.named_parameters():
        if "alpha_proj" in key and name == "gka, no steps":
            continue  # nothing to blend
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key
        direction[key] = rng.standard_normal(parameter.shape) * np.abs(weights[key]).mean()
        slope += float((parameter.grad.numpy() * direction[key]).sum())
    values = []
    for step in (1e-5, -1e-5):
        moved = {key: w.astype(np.float64) + step * direction.get(key, 0) for key, w in weights.items()}
        values.append((reference.forward(config, moved, tokens, None, segments)[0] * probe).sum())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


# --- recurrences by themselves ----------------------------------------------------------------------------------------


def recurrence_inputs(t, seed=0):
    torch.manual_seed(seed)
    b, h, n, p = 2, 3, 5, 4
    q, k = (torch.nn.functional.normalize(torch.randn(b, t, h, n, dtype=torch.float64), dim=-1) for _ in range(2))
    v, beta = torch.randn(b, t, h, p, dtype=torch.float64), 2 * torch.rand(b, t, h, dtype=torch.float64)
    g = -torch.rand(b, t, h, dtype=torch.float64) * torch.tensor([0.01, 1.0, 60.0], dtype=torch.float64)
    S = torch.randn(b, h, p, n, dtype=torch.float64)
    return q, k, v, g, beta, S


def by_step(step, inputs, state, reset):
    out = []
    for i in range(reset.shape[1]):
        state = state * ~reset[:, i, None, None, None]
        o, state = step(*(x[:, i] for x in inputs), state)
        out.append(o)
    return torch.stack(out, dim=1), state


@pytest.mark.parametrize("t", [1, 2, 31, 63, 64, 65, 127, 128, 129, 200, 300])
def test_chunks_are_the_steps(t):
    q, k, v, g, beta, S = recurrence_inputs(t)
    reset = torch.rand(2, t) < 0.03
    H = S.mT @ S
    cases = [
        (linear_attention, linear_attention_step, (q, k, v, g), S, ()),
        (delta_rule, delta_rule_step, (q, k, v, g, beta), S, ()),
        (ridge_queries, ridge_queries_step, (q, k, g), H, (0.02, 30)),
    ]
    for whole, step, inputs, start, options in cases:
        want, end = by_step(lambda *a, step=step, options=options: step(*a, *options), inputs, start, reset)
        got, state = whole(*inputs, start, *options, reset)
        assert_close(got, want, 1e-12, whole.__name__)
        assert_close(state, end, 1e-12, whole.__name__)


def test_recurrences_have_their_derivatives():
    *tokens, S = recurrence_inputs(7)
    q, k, v, g, beta, S = (x.detach().requires_grad_() for x in (*(x[:1, :, :2] for x in tokens), S[:1, :2]))
    reset = torch.tensor([[False, False, False, False, True, False, False]])
    assert torch.autograd.gradcheck(lambda q, k, v, g, S: linear_attention(q, k, v, g, S, reset, 3), (q, k, v, g, S))
    assert torch.autograd.gradcheck(lambda *x: delta_rule(*x, reset=reset, chunk=3), (q, k, v, g, beta, S))
    assert torch.autograd.gradcheck(lambda q, k, g, S: ridge_queries(q, k, g, S.mT @ S, 0.1, 5, reset, 3), (q, k, g, S))


def test_nothing_remembered_reads_zero_and_has_no_nan():
    zero = torch.zeros(1, 3, 1, 4, requires_grad=True)
    q = torch.ones(1, 3, 1, 4, requires_grad=True)
    x, H = ridge_queries(q, zero, torch.zeros(1, 3, 1), torch.zeros(1, 1, 4, 4), 0.02, 30)
    (x.sum() + H.sum()).backward()
    assert not x.any()
    assert zero.grad is not None and q.grad is not None
    assert torch.isfinite(zero.grad).all() and torch.isfinite(q.grad).all()


# --- initialisation ---------------------------------------------------------------------------------------------------


@NAMES
def test_a_new_mixer_is_drawn_as_published(name):
    torch.manual_seed(0)
    config = alone(name)
    ssm, parameters = config.ssm_of(0), dict(Model(config).layers[0].get_submodule("mixer").named_parameters())
    assert ssm is not None
    if "A_log" in parameters:
        A, step = parameters["A_log"].exp(), torch.nn.functional.softplus(parameters["dt_bias"])
        assert A.min() > (0.999 if ssm.kind == "mamba2" else 0) and A.max() < 16.001
        assert step.min() > 0.999e-3 and step.max() < 0.1001
    for key, value in parameters.items():
        if key.endswith("norm.weight") or key == "D":
            assert (value == 1).all()
        elif key.endswith("linearB.weight"):
            assert not value.any()
        elif key.endswith("_rep"):
            assert torch.equal(value, torch.eye(2).repeat_interleave(2, dim=0))
