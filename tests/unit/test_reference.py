"""The oracle against itself and against small straight-line implementations written another way.

Streaming and parallel forms share projections and mixers, so the special cases of docs/model.md section 5 are checked
against independent code: PyTorch's attention for Transformers, a loop over scalars for Mamba, a brute-force definition
for the eidetic sets and for the whole B'MOJO layer.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo_edge import reference
from bmojo_edge.config import Config
from bmojo_edge.reference_memory import innovations, rotate, slot_positions
from bmojo_edge.rope import turns_per_token
from bmojo_edge.state import leaves, spec_bytes, state_spec
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

EXACT = 1e-12  # float64 against float64
forward = reference.forward


# --- the two forms, and streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRID)
def test_streaming_equals_parallel(name: str) -> None:
    config = GRID[name]
    weights, tokens = random_weights(config), random_tokens(config, 2, 40)
    got, _, memory = forward(config, weights, tokens, return_memory=True)
    ref, parallel = reference.forward_parallel(config, weights, tokens)
    assert_close(got, ref, EXACT, "logits")
    assert_close(memory.scores, parallel.scores, EXACT, "scores")
    np.testing.assert_array_equal(memory.eidetic_index, parallel.eidetic_index)


@pytest.mark.parametrize("name", ["all", "mixed", "no ssm", "chunk of one", "mamba"])
@settings(max_examples=10)
@given(data=st.data())
def test_any_split_gives_the_same_logits_and_state(name: str, data: st.DataObject) -> None:
    config = GRID[name]
    weights, tokens = random_weights(config), random_tokens(config, 1, 33)
    cuts = sorted(data.draw(st.sets(st.integers(1, 32), max_size=6)))
    ref, ref_state = forward(config, weights, tokens)
    state, parts = None, []
    for piece in np.split(tokens, cuts, axis=1):
        logits, state = forward(config, weights, piece, state)
        parts.append(logits)
    assert_close(np.concatenate(parts, axis=1), ref, EXACT, "logits")
    assert_states_close(state, ref_state, EXACT)


@pytest.mark.parametrize("name", ["all", "mixed", "yarn", "untied, qk-norm, bias"])
def test_offset_changes_rotation_only(name: str) -> None:
    config = GRID[name]
    weights, tokens = random_weights(config), random_tokens(config, 1, 40)
    ref, ref_state = forward(config, weights, tokens)
    for offset in (10**9, 2**40 + 12345, 2**62):
        got, state = forward(config, weights, tokens, reference.init_state(config, offset=offset))
        assert_close(got, ref, 1e-11, f"offset {offset}")  # an angle is a float64 of up to pi
        np.testing.assert_array_equal(state.position, ref_state.position)


def test_state_is_a_value_of_the_specified_shape() -> None:
    for config in GRID.values():
        state = reference.init_state(config, 2)
        before = [(name, leaf.copy()) for name, leaf in leaves(state)]
        _, after = forward(config, random_weights(config), random_tokens(config, 2, 21), state)
        for (name, old), (_, now) in zip(before, leaves(state), strict=True):
            np.testing.assert_array_equal(now, old, err_msg=f"{name} was written to")
        spec = state_spec(config, 2, tokens=21)
        for (name, leaf), (_, array) in zip(leaves(spec), leaves(after), strict=True):
            assert array.shape == leaf.shape, name
        assert spec_bytes(spec) == config.state_bytes(2, 21)


def test_documents_are_computed_as_if_alone() -> None:
    for name in ("all", "mixed", "no ssm"):
        config = GRID[name]
        weights, tokens = random_weights(config), random_tokens(config, 1, 50)
        segments = np.array([[-1] * 3 + [7] * 18 + [2] * 9 + [-1] * 2 + [2] * 14 + [-1] * 4])
        logits, state, memory = forward(config, weights, tokens, segment_ids=segments, return_memory=True)
        chunk = 0
        for begin, end in ((3, 21), (21, 30), (32, 46)):
            ref, ref_state, alone = forward(config, weights, tokens[:, begin:end], return_memory=True)
            np.testing.assert_array_equal(logits[:, begin:end], ref)
            np.testing.assert_array_equal(memory.scores[..., begin:end], alone.scores)
            n = alone.eidetic_index.shape[2]
            np.testing.assert_array_equal(memory.eidetic_index[:, :, chunk : chunk + n], alone.eidetic_index)
            chunk += n
        assert_states_equal(state, ref_state)
        assert not logits[:, segments[0] < 0].any()


def test_a_first_document_continues_the_state_and_later_ones_do_not() -> None:
    config = GRID["all"]
    weights, tokens = random_weights(config), random_tokens(config, 1, 40)
    _, carried = forward(config, weights, tokens[:, :15])
    got, _ = forward(config, weights, tokens[:, 15:], carried, segment_ids=np.array([[4] * 10 + [5] * 15]))
    whole, _ = forward(config, weights, tokens[:, :25])
    alone, _ = forward(config, weights, tokens[:, 25:])
    assert_close(got[:, :10], whole[:, 15:], EXACT)
    assert_close(got[:, 10:], alone, EXACT)


def test_right_padding_changes_nothing() -> None:
    for name in ("all", "mixed"):
        config = GRID[name]
        weights, tokens = random_weights(config), random_tokens(config, 3, 24)
        lengths = [24, 7, 0]
        _, carried = forward(config, weights, random_tokens(config, 3, 11, seed=5))
        logits, state = forward(config, weights, tokens, carried, lengths=lengths)
        for row, n in enumerate(lengths):
            assert not logits[row, n:].any()
            before = take_row(carried, row)
            if n == 0:
                assert_states_equal(take_row(state, row), before)
                continue
            ref, ref_state = forward(config, weights, tokens[row : row + 1, :n], before)
            np.testing.assert_array_equal(logits[row : row + 1, :n], ref)
            assert_states_equal(take_row(state, row), ref_state)


def test_no_token_sees_the_future() -> None:
    for name, config in GRID.items():
        weights, tokens = random_weights(config), random_tokens(config, 1, 30)
        changed = tokens.copy()
        changed[0, 20] = (changed[0, 20] + 1) % config.vocab_size
        a, b = (forward(config, weights, x)[0] for x in (tokens, changed))
        np.testing.assert_array_equal(a[:, :20], b[:, :20], err_msg=name)
        assert np.abs(a[:, 20:] - b[:, 20:]).max() > 1e-6, name


# --- positions, innovation, sets --------------------------------------------------------------------------------------


def test_rotation_is_exact_at_any_position() -> None:
    config = odd(rope_theta=10000.0)
    turns, rng = turns_per_token(config), np.random.default_rng(0)
    assert turns is not None
    x = rng.standard_normal((3, 1, config.d_head))
    positions = np.array([5, 2**40 + 3, 2**62 + 11])
    got = rotate(x, positions, turns)
    for n, position in enumerate(positions.tolist()):
        for j in range(config.d_head // 2):
            angle = 2 * math.pi * (position * int(turns[j]) % 2**64) / 2**64  # Python's integers do not wrap
            a, b = x[n, 0, j], x[n, 0, j + config.d_head // 2]
            assert math.isclose(got[n, 0, j], a * math.cos(angle) - b * math.sin(angle), abs_tol=1e-12)
            assert math.isclose(got[n, 0, j + 3], b * math.cos(angle) + a * math.sin(angle), abs_tol=1e-12)
    np.testing.assert_allclose(rotate(got, positions, turns, inverse=True), x, atol=1e-12)
    assert int(turns[1]) == round(10000.0 ** (-2 / 6) / (2 * math.pi) * 2**64)


@pytest.mark.parametrize("error", ["relative", "l2"])
def test_innovation_is_the_error_of_a_fixed_average(error: str) -> None:
    rng = np.random.default_rng(0)
    rule = dataclasses.replace(odd().innovation, error=error, taps=3)
    signal = rng.standard_normal((7, 4))
    got = innovations(signal, np.zeros((3, 4)), rule)
    for t in range(7):
        predicted = np.zeros(4)
        for j, c in ((1, 4 / 7), (2, 2 / 7), (3, 1 / 7)):
            predicted += c * signal[t - j] if t >= j else 0
        expected = ((signal[t] - predicted) ** 2).sum()
        if error == "relative":
            expected /= (signal[t] ** 2).sum() + 1e-6
        assert math.isclose(got[t], expected, rel_tol=1e-12)


def test_slots_hold_the_latest_position_of_their_residue() -> None:
    for n in (1, 3, 8):
        for last in range(-1, 20):
            held = slot_positions(n, last)
            for slot in range(n):
                written = [j for j in range(last + 1) if j % n == slot]
                assert held[slot] == written[-1] if written else held[slot] < 0


@pytest.mark.parametrize("name", ["all", "no sinks", "chunk of one", "chunk is window", "window of one", "no ssm"])
def test_sets_are_the_largest_scores_among_the_eligible(name: str) -> None:
    """Step 6 by brute force: rank every eligible position by (score, earlier first), keep e, sort by position."""
    config = GRID[name]
    tokens = random_tokens(config, 1, 50)
    _, _, memory = forward(config, random_weights(config), tokens, return_memory=True)
    for layer in range(2):
        scores = memory.scores[0, layer].tolist()
        for c, found in enumerate(memory.eidetic_index[0, layer]):
            eligible = [j for j in range(50) if config.n_sinks <= j < (c + 1) * config.chunk_size - config.window]
            best = sorted(sorted(eligible, key=lambda j: (-scores[j], j))[: config.n_eidetic])
            assert [j for j in found.tolist() if j >= 0] == best
            assert (found[len(best) :] == -1).all()


def test_ties_go_to_the_earlier_token() -> None:
    config = odd("bmojo", ssm=None, innovation={"signal": "input"})
    _, _, memory = forward(config, random_weights(config), np.full((1, 40), 3), return_memory=True)
    scores = memory.scores[0, 0]
    assert scores[4] < 1e-20 < scores[3]  # once the taps are full, a repeated token is no surprise at all
    # Sinks take 0 and 1; 2 and 3 are surprising; all later scores tie, so the earliest stay for ever.
    assert memory.eidetic_index[0, 0, -1].tolist() == [2, 3, 4, 5, 6]


def test_forced_sets_are_used_and_impossible_ones_refused() -> None:
    config = GRID["all"]
    weights, tokens = random_weights(config), random_tokens(config, 1, 40)
    logits, state, memory = forward(config, weights, tokens, return_memory=True)
    again, same_state = forward(config, weights, tokens, eidetic_index=memory.eidetic_index)
    assert_close(again, logits, EXACT)
    assert_states_close(same_state, state, EXACT)
    rng = np.random.default_rng(1)
    forced = np.full_like(memory.eidetic_index, -1)
    for c in range(forced.shape[2]):
        eligible = np.arange(config.n_sinks, max((c + 1) * config.chunk_size - config.window, config.n_sinks))
        picks = np.sort(rng.permutation(eligible)[: config.n_eidetic])
        forced[:, :, c, : len(picks)] = picks
    streaming, _, used = forward(config, weights, tokens, eidetic_index=forced, return_memory=True)
    parallel, _ = reference.forward_parallel(config, weights, tokens, eidetic_index=forced)
    np.testing.assert_array_equal(used.eidetic_index, forced)
    assert_close(streaming, parallel, EXACT)
    assert np.abs(streaming - logits).max() > 1e-3
    forced[0, 0, 5, 0] = 30  # still in the window of chunk 5
    with pytest.raises(ValueError, match="position 30"):
        forward(config, weights, tokens, eidetic_index=forced)


# --- special cases, computed another way ------------------------------------------------------------------------------


def _torch():
    return pytest.importorskip("torch")


def mixture(experts, w, u):
    """Every expert on every token, all but the likeliest weighted by 0, the others by the softmax over all."""
    torch = _torch()
    shares = torch.softmax(u @ w["router.weight"].T, dim=-1)  # (b, t, n)
    least = shares.topk(experts.per_token).values[..., -1:]
    shares = torch.where(shares >= least, shares, 0)
    gate, up = (torch.einsum("btd,nfd->btnf", u, w[f"experts.{x}_proj.weight"]) for x in ("gate", "up"))
    hidden = torch.nn.functional.silu(gate) * up
    return torch.einsum("btnf,ndf,btn->btd", hidden, w["experts.down_proj.weight"], shares)


def transformer(config: Config, weights, tokens, window: int | None):
    """A Llama-style decoder in PyTorch float64 with `scaled_dot_product_attention` and complex rotations."""
    torch = _torch()
    functional = torch.nn.functional
    w = {name: torch.tensor(array, dtype=torch.float64) for name, array in weights.items()}
    b, t, p = *tokens.shape, config.d_head
    steps = torch.arange(t)
    distance = steps[:, None] - steps
    mask = (distance >= 0) & (distance < (window or t))

    def norm(x, name):
        return functional.rms_norm(x, x.shape[-1:], w[name], config.norm_eps)

    def heads(x, name, rotated):
        x = functional.linear(x, w[f"{name}_proj.weight"], w.get(f"{name}_proj.bias")).view(b, t, -1, p).transpose(1, 2)
        if f"{name}_norm.weight" in w:
            x = norm(x, f"{name}_norm.weight")
        if not rotated or config.rope_theta is None:
            return x
        freq = config.rope_theta ** (-torch.arange(0, p, 2, dtype=torch.float64) / p)
        turn = torch.polar(torch.ones(t, p // 2, dtype=torch.float64), steps[:, None] * freq)
        pair = torch.complex(x[..., : p // 2], x[..., p // 2 :]) * turn
        return torch.cat([pair.real, pair.imag], dim=-1)

    h = w["embed.weight"][torch.tensor(tokens)]
    for i in range(len(config.layer_types)):
        mixer, names = f"layers.{i}.mixer.", list(w)
        w |= {name.removeprefix(mixer): w[name] for name in names if name.startswith(mixer)}
        u = norm(h, f"layers.{i}.norm.weight")
        q, k, v = heads(u, "q", True), heads(u, "k", True), heads(u, "v", False)
        o = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        h = h + functional.linear(o.transpose(1, 2).flatten(2), w["o_proj.weight"])
        if config.d_ff:
            u, mlp = norm(h, f"layers.{i}.mlp_norm.weight"), f"layers.{i}.mlp."
            if config.experts_of(i) is None:
                gate, up = (functional.linear(u, w[f"{mlp}{x}_proj.weight"]) for x in ("gate", "up"))
                h = h + functional.linear(functional.silu(gate) * up, w[f"{mlp}down_proj.weight"])
            else:
                h = h + mixture(config.experts_of(i), {n.removeprefix(mlp): w[n] for n in w if n.startswith(mlp)}, u)
    head = w["embed.weight"] if config.tie_embeddings else w["lm_head.weight"]
    return functional.linear(norm(h, "norm.weight"), head).numpy()


PLAIN = {"ssm": None, "n_eidetic": 0, "n_sinks": 0}
TRANSFORMERS = {
    "attention": (odd("attention", "attention", **PLAIN), None),
    "qk-norm and bias": (odd("attention", "attention", **PLAIN, qk_norm=True, attention_bias=True), None),
    "no positions, tied head": (odd("attention", **PLAIN, rope_theta=None, tie_embeddings=True), None),
    "window larger than the text": (odd("bmojo", "bmojo", **{**PLAIN, "n_eidetic": 5, "n_sinks": 2}, window=64), None),
    "sliding attention": (odd("attention", "attention", **PLAIN, attention_window=7), 7),
    "sliding bmojo": (odd("bmojo", "bmojo", **PLAIN), 8),
    "experts": (odd("attention", "attention", **PLAIN, experts={"n": 4, "per_token": 2, "layers": [1]}), None),
    "listed window": (odd("attention", **PLAIN, attention_window=[40]), None),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_special_cases(name: str) -> None:
    config, window = TRANSFORMERS[name]
    weights, tokens = random_weights(config), random_tokens(config, 2, 36)
    ref = transformer(config, weights, tokens, window)
    assert_close(forward(config, weights, tokens)[0], ref, 1e-11, name)  # angles: integer turns against float64 radians


def mamba_by_scalars(config: Config, w, u):
    """Mamba-1 with a loop over every channel and state: no array arithmetic to get wrong."""
    ssm = config.ssm_of(0)
    assert ssm is not None
    d_inner, n, r, taps = ssm.expand * config.d_model, ssm.d_state, ssm.dt_rank or 0, ssm.d_conv
    xz = [[float(np.dot(row, u_t)) for row in w["in_proj.weight"]] for u_t in u]
    state, out = [[0.0] * n for _ in range(d_inner)], []
    for t in range(len(u)):
        x = []
        for c in range(d_inner):
            total = float(w["conv.bias"][c])
            for j in range(taps):
                if t - j >= 0:
                    total += float(w["conv.weight"][c, taps - 1 - j]) * xz[t - j][c]
            x.append(total / (1 + math.exp(-total)))
        proj = [float(np.dot(row, x)) for row in w["x_proj.weight"]]
        y = []
        for c in range(d_inner):
            raw = sum(float(w["dt_proj.weight"][c, k]) * proj[k] for k in range(r)) + float(w["dt_proj.bias"][c])
            dt, total = math.log1p(math.exp(raw)), float(w["D"][c]) * x[c]
            for k in range(n):
                decay = math.exp(-dt * math.exp(float(w["A_log"][c, k])))
                state[c][k] = decay * state[c][k] + dt * proj[r + k] * x[c]
                total += proj[r + n + k] * state[c][k]
            z = xz[t][d_inner + c]
            y.append(total * z / (1 + math.exp(-z)))
        out.append([float(np.dot(row, y)) for row in w["out_proj.weight"]])
    return np.array(out), np.array(state)


def test_mamba_special_case() -> None:
    config = odd("mamba", rope_theta=None, d_ff=0)
    weights, tokens = random_weights(config), random_tokens(config, 1, 12)
    logits, state = forward(config, weights, tokens)
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    h = w["embed.weight"][tokens[0]]
    u = h / np.sqrt((h**2).mean(-1, keepdims=True) + config.norm_eps) * w["layers.0.norm.weight"]
    mixer = {name.removeprefix("layers.0.mixer."): array for name, array in w.items()}
    y, ref_state = mamba_by_scalars(config, mixer, u)
    h = h + y
    ref = h / np.sqrt((h**2).mean(-1, keepdims=True) + config.norm_eps) * w["norm.weight"] @ w["lm_head.weight"].T
    assert_close(logits[0], ref, EXACT, "logits")
    assert_close(state.layers[0].ssm[0], ref_state, EXACT, "state")


def test_bmojo_layer_by_the_definition() -> None:
    """Step 7 with python lists and sets: who is visible to query i, at which angle, under one softmax."""
    config = odd("bmojo", d_ff=0, tie_kv=False)
    weights, tokens = random_weights(config), random_tokens(config, 1, 30)
    logits, _, memory = forward(config, weights, tokens, return_memory=True)
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    mixer = {name.removeprefix("layers.0.mixer."): array for name, array in w.items()}
    h = w["embed.weight"][tokens[0]]
    u = h / np.sqrt((h**2).mean(-1, keepdims=True) + config.norm_eps) * w["layers.0.norm.weight"]
    y, _ = mamba_by_scalars(config, {name.removeprefix("ssm."): array for name, array in mixer.items()}, u)
    p, reach, theta = config.d_head, config.window, config.rope_theta or 1.0
    group = config.n_heads // config.kv_heads

    def turned(vector, position):
        out = np.empty(p)
        for j in range(p // 2):
            angle = position * theta ** (-2 * j / p)
            a, b = vector[j], vector[j + p // 2]
            out[j], out[j + p // 2] = (
                a * math.cos(angle) - b * math.sin(angle),
                b * math.cos(angle) + a * math.sin(angle),
            )
        return out

    def part(name, x, head):
        return (mixer[f"{name}_proj.weight"] @ x)[head * p : (head + 1) * p]

    out = []
    for i in range(30):
        chosen = {int(j) for j in memory.eidetic_index[0, 0, i // config.chunk_size] if j >= 0}
        o = []
        for head in range(config.n_heads):
            g, pairs = head // group, []  # (score, value)
            for j in range(30):
                if i - reach < j <= i:
                    score = turned(part("q", u[i], head), i) @ turned(part("k", u[j], g), j)
                    pairs.append((score, part("v", u[j], g)))
                if i - reach - config.fading < j <= i - reach:
                    score = turned(part("fading.q", u[i], head), i) @ turned(part("fading.k", y[j], g), j)
                    pairs.append((score, part("fading.v", y[j], g)))
                if (j < config.n_sinks or j in chosen) and j <= i - reach:
                    score = turned(part("q", u[i], head), reach) @ part("k", u[j], g)
                    pairs.append((score, part("v", u[j], g)))
            total = sum(math.exp(s / math.sqrt(p)) for s, _ in pairs)
            o.extend(np.sum([math.exp(s / math.sqrt(p)) / total * v for s, v in pairs], axis=0))
        out.append(mixer["o_proj.weight"] @ np.array(o))
    h = h + np.array(out)
    ref = h / np.sqrt((h**2).mean(-1, keepdims=True) + config.norm_eps) * w["norm.weight"] @ w["lm_head.weight"].T
    assert_close(logits[0], ref, 1e-11, "logits")
