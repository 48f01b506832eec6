"""The oracle's mamba2, gdn and gka against the published equations written another way.

Not token by token: Mamba-2 as one dense matrix per head, the delta rule as products of transition matrices, KalmaNet's
solve by eigenvalues and Chebyshev polynomials (and by a direct solver in the limit of many steps).
"""

from __future__ import annotations

import numpy as np
import pytest

from bmojo_edge import reference
from bmojo_edge.config import SSM, Config, ConfigError
from bmojo_edge.parameters import parameter_shapes
from bmojo_edge.reference_delta import chebyshev, gdn, gka
from bmojo_edge.reference_mamba2 import mamba2
from bmojo_edge.reference_ssm import Weights
from tests.helpers import assert_close, assert_states_close, random_tokens, random_weights
from tests.mixers import SSMS, alone, within

ORACLE = {"mamba2": mamba2, "gdn": gdn, "gka": gka}
T = 23


def logistic(x):
    return 1 / (1 + np.exp(-x))


def conv(x, w, b=None):
    """One channel at a time with np.convolve, whose kernel runs newest tap first."""
    y = np.stack([np.convolve(x[:, c], w[c, ::-1])[: len(x)] for c in range(x.shape[1])], axis=1)
    return y if b is None else y + b


def unit_rms(x, eps):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps)


def decays(g):
    """exp(g_{j+1} + ... + g_i) for i >= j, else 0, (t, t)."""
    total = np.cumsum(g)
    return np.tril(np.exp(np.minimum(total[:, None] - total[None], 0)))


def mamba2_dense(ssm: SSM, w, u):
    h, p, n, t = ssm.n_heads, ssm.head_dim, ssm.d_state, len(u)
    kv = ssm.n_kv_heads
    rows = {"z": h * p, "x": (kv or h) * p, "B": (kv or ssm.n_groups) * n, "C": ssm.n_groups * n, "dt": h}
    part, start = {}, 0
    for name, size in rows.items():
        block = slice(start, start + size)
        part[name] = u @ w["in_proj.weight"][block].T + (w["in_proj.bias"][block] if ssm.bias else 0)
        start += size
    start = 0
    for name in "xBC":
        if ssm.bc_norm and name != "x":
            y = part[name].reshape(t, -1, n)
            part[name] = (unit_rms(y, 1e-6) * w[f"{name}_norm.weight"]).reshape(t, -1)
        block = slice(start, start + rows[name])
        y = conv(part[name], w["conv.weight"][block], w["conv.bias"][block] if ssm.conv_bias else None)
        part[name] = y * logistic(y)
        start += rows[name]
    dt = np.log1p(np.exp(part["dt"] + w["dt_bias"]))
    low, high = ssm.dt_limit
    dt = np.maximum(dt, low) if high is None else np.minimum(np.maximum(dt, low), high)
    out, state = np.zeros((t, h, p)), np.zeros((h, p, n))
    for j in range(h):
        x = part["x"].reshape(t, -1, p)[:, j * (kv or h) // h]
        B = part["B"].reshape(t, -1, n)[:, j * (kv or ssm.n_groups) // h]
        C = part["C"].reshape(t, -1, n)[:, j * ssm.n_groups // h]
        M = (C @ B.T) * decays(-dt[:, j] * np.exp(w["A_log"][j])) * dt[None, :, j]
        out[:, j] = M @ x + w["D"][j] * x
        state[j] = x.T @ (decays(-dt[:, j] * np.exp(w["A_log"][j]))[-1][:, None] * dt[:, j, None] * B)
    gated = out.reshape(t, -1) * part["z"] * logistic(part["z"])
    groups = np.split(gated, ssm.n_groups, axis=1)
    y = np.concatenate([unit_rms(group, ssm.norm_eps) for group in groups], axis=1) * w["norm.weight"]
    return y @ w["out_proj.weight"].T + (w["out_proj.bias"] if ssm.bias else 0), state


def qkv(ssm: SSM, w, u, plain=""):
    """q, k, v as lists of heads (t, p); names in `plain` get neither convolution nor SiLU, gdn without conv SiLU."""
    p, heads, out = ssm.head_dim, max(ssm.n_heads, ssm.n_k_heads, ssm.n_v_heads), []
    for name, own in (("q", ssm.n_heads), ("k", ssm.n_k_heads), ("v", ssm.n_v_heads)):
        x = u @ w[f"{name}_proj.weight"].T
        if name not in plain:
            if f"{name}_conv.weight" in w:
                x = conv(x, w[f"{name}_conv.weight"], w.get(f"{name}_conv.bias"))
            x = x * logistic(x)
        own_heads = [x[:, i * p : (i + 1) * p] for i in range(own)]
        all_heads = [own_heads[j // (heads // own)] for j in range(heads)]
        if name != "q" and ssm.kv_proj_rank and min(ssm.n_k_heads, ssm.n_v_heads) < heads:
            if ssm.kv_learnable_residual:
                all_heads = [sum(w[f"{name}_rep"][j, i] * own_heads[i] for i in range(own)) for j in range(heads)]
            a = x @ w[f"proj_{name}.linearA.weight"].T
            extra = (a * logistic(a)) @ w[f"proj_{name}.linearB.weight"].T
            all_heads = [y + extra[:, j * p : (j + 1) * p] for j, y in enumerate(all_heads)]
        out.append(all_heads)
    return out


def output(ssm: SSM, w, u, heads):
    y = np.concatenate([unit_rms(o, ssm.norm_eps) * w["o_norm.weight"] for o in heads], axis=1)
    if ssm.use_gate:
        gate = u @ w["g_proj.weight"].T
        y = y * gate * logistic(gate)
    return y @ w["o_proj.weight"].T


def log_decay(w, a, j):
    return -np.exp(w["A_log"][j]) * np.log1p(np.exp(a[:, j] + w["dt_bias"][j]))


def gdn_products(ssm: SSM, w, u):
    q, k, v = qkv(ssm, w, u)
    p, outs, states = ssm.head_dim, [], []
    for j in range(len(q)):
        unit_q, unit_k = (x[j] / np.sqrt(np.sum(x[j] ** 2, axis=1, keepdims=True) + 1e-6) for x in (q, k))
        beta = logistic(u @ w["b_proj.weight"][j]) * (2 if ssm.allow_neg_eigval else 1)
        g = log_decay(w, u @ w["gk_proj.weight"].T, j)
        o, S = [], np.zeros((p, p))
        for i in range(len(u)):
            S, transition = np.zeros((p, p)), np.eye(p)
            for m in range(i, -1, -1):  # v_m k_m^T met by every later transition
                S += beta[m] * np.outer(v[j][m], unit_k[m]) @ transition
                transition = np.exp(g[m]) * (np.eye(p) - beta[m] * np.outer(unit_k[m], unit_k[m])) @ transition
            o.append(S @ unit_q[i] / np.sqrt(p))
        outs.append(np.stack(o))
        states.append(S)
    return output(ssm, w, u, outs), np.stack(states)


def chebyshev_spectral(H, q, ridge, steps):
    """x after `steps` steps: each eigenvector's error is T_k of its place in the interval over T_k beyond its end."""
    norm = np.linalg.norm(H)
    lam, vectors = np.linalg.eigh(H)
    lam = lam + ridge * norm
    a, b, k = ridge * norm, (1 + ridge) * norm, steps + 1
    place = (a + b - 2 * lam) / (b - a)
    left = np.cos(k * np.arccos(np.clip(place, -1, 1))) / np.cosh(k * np.arccosh((a + b) / (b - a)))
    return vectors @ ((1 - left) / lam * (vectors.T @ q))


def gka_sums(ssm: SSM, w, u, solve):
    q, k, v = qkv(ssm, w, u, plain="" if ssm.use_v_conv else "v")
    t, outs, states = len(u), [], []
    for j in range(len(q)):
        unit_q, unit_k = (x[j] / (np.linalg.norm(x[j], axis=1, keepdims=True) + 1e-6) for x in (q, k))
        value, alpha, decay_U = v[j], np.ones(t), np.tril(np.ones((t, t)))
        if ssm.use_beta_gate:
            beta = logistic(u @ w["b_proj.weight"][j] + w["b_proj.bias"][j])[:, None] + 1e-6
            unit_k, value = unit_k * beta, value * beta
        if ssm.use_alpha_connection:
            alpha = logistic(u @ w["alpha_proj.weight"][j] + w["alpha_proj.bias"][j])
        if ssm.use_forgetting_gate:
            decay_U = decays(log_decay(w, u @ w["a_proj.weight"].T, j))
        decay_H = decay_U if ssm.use_forgetting_gate_kk else np.tril(np.ones((t, t)))
        o, H, U = [], np.empty(0), np.empty(0)
        for i in range(t):
            H = unit_k.T @ (decay_H[i][:, None] * unit_k)
            U = value.T @ (decay_U[i][:, None] * unit_k)
            x = solve(H, unit_q[i]) if ssm.num_iter else unit_q[i]
            o.append(U @ ((1 - alpha[i]) * unit_q[i] + alpha[i] * x))
        outs.append(np.stack(o) * (ssm.head_dim**-0.5 if ssm.gla_rescale else 1))
        states.append((H, U))
    return output(ssm, w, u, outs), np.stack([s[0] for s in states]), np.stack([s[1] for s in states])


def first_mixer(weights):
    prefix = "layers.0.mixer."
    return {key.removeprefix(prefix): x.astype(np.float64) for key, x in weights.items() if key.startswith(prefix)}


def mixer_case(name):
    config = alone(name)
    weights = random_weights(config)
    w = first_mixer(weights)
    u = np.random.default_rng(5).standard_normal((T, config.d_model))
    ssm = config.ssm_of(0)
    assert ssm is not None
    got, state = ORACLE[ssm.kind](config, ssm, Weights(weights, np.float64, "layers.0.mixer."), u, None)
    return ssm, w, u, got, state


@pytest.mark.parametrize("name", SSMS)
def test_oracle_is_the_published_equations(name):
    ssm, w, u, got, state = mixer_case(name)
    if ssm.kind == "mamba2":
        want, final = mamba2_dense(ssm, w, u)
        assert_close(state.ssm, final, 1e-12, "state")
    elif ssm.kind == "gdn":
        want, final = gdn_products(ssm, w, u)
        assert_close(state.ssm, final, 1e-12, "state")
    else:
        want, H, U = gka_sums(ssm, w, u, lambda H, q: chebyshev_spectral(H, q, ssm.ridge_strength, ssm.num_iter))
        assert_close(state.H, H, 1e-12, "H")
        assert_close(state.U, U, 1e-12, "U")
    assert_close(got, want, 1e-10, name)


@pytest.mark.parametrize("ridge", [0.02, 0.3])
def test_many_chebyshev_steps_solve_the_ridge_regression(ridge):
    rng = np.random.default_rng(0)
    keys, q = rng.standard_normal((9, 6)), rng.standard_normal(6)
    for H in (keys.T @ keys, np.outer(keys[0], keys[0]), 1e-9 * keys.T @ keys):
        direct = np.linalg.solve(H + ridge * np.linalg.norm(H) * np.eye(6), q)
        errors = [np.linalg.norm(chebyshev(H, q, ridge, n) - direct) / np.linalg.norm(direct) for n in (30, 200)]
        assert errors[0] < 2e-3
        assert errors[1] < 1e-12


def test_nothing_remembered_is_nothing_read():
    np.testing.assert_array_equal(chebyshev(np.zeros((3, 3)), np.ones(3), 0.02, 30), np.zeros(3))


@pytest.mark.parametrize("name", SSMS)
@pytest.mark.parametrize("place", [alone, within])
def test_any_split_gives_the_same_logits_and_state(name, place):
    config = place(name)
    weights, tokens = random_weights(config), random_tokens(config, 2, 19)
    whole, final = reference.forward(config, weights, tokens)
    parts, state = [], None
    for part in np.split(tokens, [1, 2, 9], axis=1):
        logits, state = reference.forward(config, weights, part, state)
        parts.append(logits)
    assert_close(np.concatenate(parts, axis=1), whole, 1e-11, name)
    assert_states_close(state, final, 1e-11)
    assert_close(reference.forward_parallel(config, weights, tokens)[0], whole, 1e-11, name)


def test_transformers_mamba2_agrees():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            hidden_size=20, num_heads=8, head_dim=5, state_size=3, n_groups=4, num_hidden_layers=2, vocab_size=37,
            use_bias=True, time_step_limit=(0.05, 0.3), layer_norm_epsilon=1e-3, chunk_size=8,
        )
    )  # fmt: skip
    names = {"backbone.embeddings": "embed", "backbone.norm_f": "norm", "backbone.": "", "conv1d": "conv"}
    weights = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = tensor.numpy()[:, 0] if name.endswith("conv.weight") else tensor.numpy()
    config = alone("mamba2, groups, biases, dt limits", d_ff=0, norm_eps=1e-3)
    config = config.replace(ssm={**SSMS["mamba2, groups, biases, dt limits"], "norm_eps": 1e-3})
    assert {name: w.shape for name, w in weights.items()} == parameter_shapes(config)
    tokens = random_tokens(config, 2, 29)
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits
    assert_close(reference.forward(config, weights, tokens)[0], want, 2e-6)


def test_transformers_gated_delta_rule_agrees():
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = alone("gdn", n_heads=4, n_kv_heads=4)
    ssm, weights = config.ssm_of(0), random_weights(config)
    assert ssm is not None
    w = first_mixer(weights)
    u = np.random.default_rng(5).standard_normal((T, config.d_model))
    q, k, v = (torch.tensor(np.stack(x, axis=1))[None] for x in qkv(ssm, w, u))
    g = np.stack([log_decay(w, u @ w["gk_proj.weight"].T, j) for j in range(4)], axis=1)
    beta = logistic(u @ w["b_proj.weight"].T)
    out, _ = module.torch_recurrent_gated_delta_rule(
        q, k, v, torch.tensor(g)[None], torch.tensor(beta)[None], None, False, use_qk_l2norm_in_kernel=True
    )
    want = output(ssm, w, u, [out[0, :, j].double().numpy() for j in range(4)])
    got, _ = gdn(config, ssm, Weights(weights, np.float64, "layers.0.mixer."), u, None)
    assert_close(got, want, 2e-6)


# --- configuration --------------------------------------------------------------------------------------------------


def test_a_field_left_out_has_the_default_of_the_layers_kind():
    config = Config(vocab_size=8, d_model=64, n_heads=4, n_kv_heads=2, layer_types=("mamba2", "gdn", "gka", "bmojo"))
    found = [config.ssm_of(i) for i in range(4)]
    assert [s.kind for s in found if s] == ["mamba2", "gdn", "gka", "mamba2"]
    assert [s.norm_eps for s in found if s] == [1e-5, 1e-5, 1e-6, 1e-5]
    assert [s.conv_bias for s in found if s] == [True, False, False, True]
    assert [(s.n_heads, s.head_dim) for s in found if s] == [(2, 64), (4, 16), (4, 16), (2, 64)]
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", SSMS)
def test_json_keeps_the_table(name):
    config = within(name)
    assert Config.from_json(config.to_json()) == config
    assert config.ssm == config.ssm_of(0)


def test_a_preset_takes_another_kind():
    config = Config.preset("tiny", ssm={"kind": "gka"})
    assert config.ssm is not None
    assert (config.ssm.kind, config.ssm.num_iter, config.ssm.n_k_heads) == ("gka", 30, 1)
    assert (
        Config.preset("tiny", ssm={"d_state": 8}).ssm == Config.preset("tiny", ssm={"d_state": 8, "kind": "mamba"}).ssm
    )


@pytest.mark.parametrize(
    ("ssm", "field"),
    [
        ({"kind": "rwkv"}, "ssm.kind"),
        ({"kind": "gka", "num_iter": -1}, "ssm.num_iter"),
        ({"kind": "gka", "num_iter": 2.5}, "ssm.num_iter"),
        ({"kind": "gka", "ridge_strength": 0}, "ssm.ridge_strength"),
        ({"kind": "gka", "use_gate": 1}, "ssm.use_gate"),
        ({"kind": "gka", "solver_type": "cg"}, "ssm.solver_type"),
        ({"kind": "gka", "d_state": 4}, "ssm.d_state"),
        ({"kind": "gdn", "n_heads": 3, "n_k_heads": 4}, "ssm.n_heads"),
        ({"kind": "gdn", "kv_learnable_residual": True}, "ssm.kv_learnable_residual"),
        ({"kind": "mamba2", "n_heads": 4, "n_groups": 3}, "ssm.n_groups"),
        ({"kind": "mamba2", "n_heads": 4, "head_dim": 6, "expand": 2}, "ssm.expand"),
        ({"kind": "mamba2", "head_dim": 7}, "ssm.head_dim"),
        ({"kind": "mamba2", "dt_limit": [0.2, 0.1]}, "ssm.dt_limit"),
        ({"kind": "mamba2", "dt_limit": 0.2}, "ssm.dt_limit"),
        ({"kind": "mamba", "num_iter": 3}, "ssm.num_iter"),
    ],
)
def test_a_wrong_field_is_named(ssm, field):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        Config(vocab_size=8, d_model=20, n_heads=4, n_kv_heads=2, layer_types=("bmojo",), ssm=ssm)
