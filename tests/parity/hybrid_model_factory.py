"""Checkpoints laid out as Hybrid Model Factory writes them, and their logits from the published equations.

Written from the papers and the format alone, in float64 over whole sequences: sums over all earlier tokens in place of
states, matrices in place of recurrences where there is a closed form. It shares nothing with the oracle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Array = np.ndarray
Tensors = dict[str, Array]

D, FF, V, H, G, P = 20, 28, 41, 4, 2, 6  # width, MLP, vocabulary, heads, key/value heads, head_dim (H P is not D)
W = 7  # window


def config(pattern: str, kind: str = "qwen3", **fields: Any) -> dict[str, Any]:
    """config.json of a hybrid: what its class writes, with the tables of options that the pattern needs."""
    content: dict[str, Any] = {
        "architectures": [f"Hybrid{kind.capitalize()}ForCausalLM"], "model_type": f"hybrid_{kind}",
        "hybrid_override_pattern": pattern, "layer_types": pattern.split("-"),
        "num_hidden_layers": pattern.count("-") + 1,
        "vocab_size": V, "hidden_size": D, "intermediate_size": FF, "num_attention_heads": H, "num_key_value_heads": G,
        "head_dim": P, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32", "use_cache": True,
    }  # fmt: skip
    if kind != "qwen2":
        content["attention_bias"] = False
    if "BMF" in pattern:
        content["bmojo_config"] = {"window_size": W, "tie_attn_weights": True, "ssm_mixer": "mamba2"}
    if "SWA" in pattern:
        content["swa_config"] = {"window_size": W}
    for name, value in fields.items():
        merges = isinstance(value, dict) and isinstance(content.get(name), dict)
        content[name] = {**content[name], **value} if merges else value
    return content


# --- tensors, by name and shape -------------------------------------------------------------------------------------


def _projections(c: dict[str, Any], at: str, mark: str = "") -> dict[str, tuple[int, ...]]:
    g = c["num_key_value_heads"]
    rows = {"q": H * P, "k": g * P, "v": g * P}
    shapes: dict[str, tuple[int, ...]] = {f"{at}.{x}_proj{mark}.weight": (n, D) for x, n in rows.items()}
    if c["model_type"] == "hybrid_qwen2":
        shapes |= {f"{at}.{x}_proj{mark}.bias": (n,) for x, n in rows.items()}
    if c["model_type"] == "hybrid_qwen3":
        shapes |= {f"{at}.{x}_norm{mark}.weight": (P,) for x in "qk"}
    return shapes


def _mamba(c: dict[str, Any], at: str) -> dict[str, tuple[int, ...]]:
    channels = H * P + 2 * c["num_key_value_heads"] * P
    shapes: dict[str, tuple[int, ...]] = {
        "in_proj.weight": (H * P + channels + H, D), "conv1d.weight": (channels, 1, 4), "conv1d.bias": (channels,),
        "dt_bias": (H,), "A_log": (H,), "D": (H,), "norm.weight": (H * P,), "out_proj.weight": (D, H * P),
    }  # fmt: skip
    if c["model_type"] == "hybrid_qwen3" and c.get("mamba2_config", {}).get("use_qk_norm", True):
        shapes |= {"B_norm.weight": (P,), "C_norm.weight": (P,)}
    return {f"{at}.{name}": shape for name, shape in shapes.items()}


def _delta(c: dict[str, Any], at: str, kind: str) -> dict[str, tuple[int, ...]]:
    given, g = c.get(f"{kind}_config", {}), c["num_key_value_heads"]
    rows = {"q": H * P, "k": g * P, "v": g * P}
    shapes: dict[str, tuple[int, ...]] = {f"{x}_proj.weight": (n, D) for x, n in rows.items()}
    shapes |= {"A_log": (H,), "dt_bias": (H,), "o_norm.weight": (P,), "o_proj.weight": (D, H * P)}
    if given.get("use_gate", True):
        shapes["g_proj.weight"] = (H * P, D)
    taps = given.get("conv_size", 4)
    convolved = "qkv" if given.get("use_short_conv", True) and given.get("use_v_conv", True) else "qk"
    if given.get("use_short_conv", True):
        shapes |= {f"{x}_conv1d.weight": (rows[x], 1, taps) for x in convolved}
        if given.get("conv_bias"):
            shapes |= {f"{x}_conv1d.bias": (rows[x],) for x in convolved}
    if kind == "gdn":
        shapes |= {"b_proj.weight": (H, D), "gk_proj.weight": (H, D)}
    else:
        shapes["a_proj.weight"] = (H, D)
        if given.get("use_beta_gate", True):
            shapes |= {"b_proj.weight": (H, D), "b_proj.bias": (H,)}
        if given.get("use_alpha_connection", True):
            shapes |= {"alpha_proj.weight": (H, D), "alpha_proj.bias": (H,)}
    rank = given.get("kv_proj_rank")
    for x in "kv" if rank else "":
        shapes |= {f"proj_{x}.linearA.weight": (rank, rows[x]), f"proj_{x}.linearB.weight": (H * P, rank)}
        if given.get("kv_learnable_residual"):
            shapes[f"{x}_rep"] = (H, g)
    return {f"{at}.{name}": shape for name, shape in shapes.items()}


def _ssm(c: dict[str, Any], at: str, kind: str) -> dict[str, tuple[int, ...]]:
    kind = {"gated_deltanet": "gdn", "gated_kalmanet": "gka"}.get(kind.lower(), kind.lower())
    return _mamba(c, f"{at}mamba") if kind == "mamba2" else _delta(c, f"{at}{kind}", kind)


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (V, D)
    for i, symbol in enumerate(c["hybrid_override_pattern"].split("-")):
        at = f"model.layers.{i}"
        found |= {f"{at}.{name}.weight": (D,) for name in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{at}.mlp.{x}_proj.weight": (FF, D) for x in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = (D, FF)
        if symbol in ("*", "SWA", "BMF"):
            module = {"*": "self_attn", "SWA": "swa", "BMF": "bmojo_f.bmojo_attn"}[symbol]
            found |= _projections(c, f"{at}.{module}") | {f"{at}.{module}.o_proj.weight": (D, H * P)}
        if symbol == "BMF":
            if not c["bmojo_config"]["tie_attn_weights"]:
                found |= _projections(c, f"{at}.bmojo_f.bmojo_attn", "_")
            found |= _ssm(c, f"{at}.bmojo_f.", c["bmojo_config"]["ssm_mixer"])
        elif symbol in ("M2", "GDN", "GKA"):
            found |= _ssm(c, f"{at}.", {"M2": "mamba2"}.get(symbol, symbol))
    return found


def tensors(c: dict[str, Any], seed: int = 0) -> Tensors:
    """Random tensors at which everything matters."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        noise = rng.standard_normal(shape)
        if "norm" in name or name.endswith(".D"):
            return 1 + 0.3 * noise
        if name.endswith(("A_log", "bias", "_rep")):
            return 0.3 * noise - 1.5 * name.endswith("dt_bias") + 0.5 * name.endswith("_rep")
        return noise * (1.5 if "q_proj" in name else 1.0) / (1.0 if "embed" in name else np.sqrt(shape[-1]))

    return {name: draw(name, shape).astype(np.float32) for name, shape in shapes(c).items()}


def save(folder: Path, c: dict[str, Any], weights: Tensors, shards: int = 1) -> Path:
    """A folder as save_pretrained leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(c, indent=2))
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, where = sorted(weights), {}
    for n in range(shards):
        part, file = names[n::shards], f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# --- the equations --------------------------------------------------------------------------------------------------


def _rms(x: Array, w: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _softplus(x: Array) -> Array:
    return np.log1p(np.exp(x))


def _conv(x: Array, w: Array, bias: Array | float = 0.0) -> Array:
    """y_t = SiLU(sum_j w_j x_(t - taps + 1 + j) + bias), x (t, c), w (c, 1, taps)."""
    t, taps = len(x), w.shape[-1]
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1])), x])
    return _silu(np.sum([padded[j : j + t] * w[:, 0, j] for j in range(taps)], axis=0) + bias)


def _rope(x: Array, theta: float) -> Array:
    """x (t, heads, p) as complex numbers x_j + i x_(j + p/2), turned by t theta^(-2j/p)."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag], axis=-1)


def _heads(c: dict[str, Any], T: Tensors, at: str, x: str, u: Array, mark: str = "") -> Array:
    """Projection x ("q", "k" or "v") of u, with bias, norm and rotation as the model has them: (t, h, p) for all."""
    y = u @ T[f"{at}.{x}_proj{mark}.weight"].T + T.get(f"{at}.{x}_proj{mark}.bias", 0.0)
    y = y.reshape(len(u), -1, P)
    if x != "v":
        norm = T.get(f"{at}.{x}_norm{mark}.weight")
        y = y if norm is None else _rms(y, norm, c["rms_norm_eps"])
        y = _rope(y, c["rope_parameters"]["rope_theta"])
    return np.repeat(y, H // y.shape[1], axis=1)


def _masked_scores(q: Array, k: Array, near: int, far: int) -> Array:
    """Scores (h, t, t) of the keys at distances near .. far - 1, the others minus infinity."""
    distance = np.arange(len(q))[:, None] - np.arange(len(q))
    scores = np.einsum("thp,shp->hts", q, k) / np.sqrt(P)
    return np.where((distance >= near) & (distance < far), scores, -np.inf)


def _attention(c: dict[str, Any], T: Tensors, at: str, u: Array, y: Array | None, reach: int) -> Array:
    """One softmax over the last `reach` keys of u and, with y, the `reach` before them of y."""
    scores = [_masked_scores(_heads(c, T, at, "q", u), _heads(c, T, at, "k", u), 0, reach)]
    values = [_heads(c, T, at, "v", u)]
    if y is not None:
        mark = "" if c["bmojo_config"]["tie_attn_weights"] else "_"
        q, k = _heads(c, T, at, "q", u, mark), _heads(c, T, at, "k", y, mark)
        scores.append(_masked_scores(q, k, reach, 2 * reach))
        values.append(_heads(c, T, at, "v", y, mark))
    weights = np.exp(np.concatenate(scores, axis=-1))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("hts,shp->thp", weights, np.concatenate(values))
    return out.reshape(len(u), -1) @ T[f"{at}.o_proj.weight"].T


def _decays(g: Array) -> Array:
    """exp(g_(s+1) + ... + g_t) for s <= t, else 0: (h, t, t) from log decays g (t, h)."""
    total = np.cumsum(g, axis=0).T  # (h, t)
    later = np.arange(len(g))[:, None] >= np.arange(len(g))
    return np.where(later, np.exp(np.where(later, total[:, :, None] - total[:, None, :], 0)), 0)


def _mamba2(c: dict[str, Any], T: Tensors, at: str, u: Array) -> Array:
    """Mamba-2 in its dual form: y = (L o C B^T) dt x (Dao and Gu, section 3)."""
    t, g = len(u), c["num_key_value_heads"]
    z, x, B, C, dt = np.split(u @ T[f"{at}.in_proj.weight"].T, np.cumsum([H * P, g * P, g * P, H * P]), axis=-1)
    if f"{at}.B_norm.weight" in T:
        B = _rms(B.reshape(t, g, P), T[f"{at}.B_norm.weight"], 1e-6).reshape(t, -1)
        C = _rms(C.reshape(t, H, P), T[f"{at}.C_norm.weight"], 1e-6).reshape(t, -1)
    xBC = _conv(np.concatenate([x, B, C], axis=-1), T[f"{at}.conv1d.weight"], T[f"{at}.conv1d.bias"])
    x, B, C = (part.reshape(t, -1, P) for part in np.split(xBC, np.cumsum([g * P, g * P]), axis=-1))
    x, B = np.repeat(x, H // g, axis=1), np.repeat(B, H // g, axis=1)
    dt = _softplus(dt + T[f"{at}.dt_bias"])
    L = _decays(-dt * np.exp(T[f"{at}.A_log"]))
    y = np.einsum("hts,thn,shn,sh,shp->thp", L, C, B, dt, x, optimize=True) + T[f"{at}.D"][:, None] * x
    y = (y * _silu(z.reshape(t, H, P))).reshape(t, H, P)
    y = _rms(y, T[f"{at}.norm.weight"].reshape(H, P), 1e-5)
    return y.reshape(t, -1) @ T[f"{at}.out_proj.weight"].T


def _qkv(T: Tensors, at: str, u: Array, given: dict[str, Any], plain_v: bool) -> tuple[Array, Array, Array]:
    """q, k and v of a delta mixer, (t, h, p) each, after convolutions and the expansion of k and v."""
    flat = {x: u @ T[f"{at}.{x}_proj.weight"].T for x in "qkv"}
    for x in "qkv":
        if f"{at}.{x}_conv1d.weight" in T:
            flat[x] = _conv(flat[x], T[f"{at}.{x}_conv1d.weight"], T.get(f"{at}.{x}_conv1d.bias", 0.0))
        elif not (x == "v" and plain_v):
            flat[x] = _silu(flat[x])
    out = []
    for x in "qkv":
        heads = flat[x].reshape(len(u), -1, P)
        whole = np.repeat(heads, H // heads.shape[1], axis=1)
        if x != "q" and given.get("kv_proj_rank") and heads.shape[1] < H:
            if given.get("kv_learnable_residual"):
                whole = np.einsum("eh,thp->tep", T[f"{at}.{x}_rep"], heads)
            low = _silu(flat[x] @ T[f"{at}.proj_{x}.linearA.weight"].T) @ T[f"{at}.proj_{x}.linearB.weight"].T
            whole = whole + low.reshape(len(u), H, P)
        out.append(whole)
    return out[0], out[1], out[2]


def _read(T: Tensors, at: str, u: Array, o: Array, eps: float) -> Array:
    """The output of a delta mixer: norm per head, gate, projection."""
    o = _rms(o, T[f"{at}.o_norm.weight"], eps).reshape(len(u), -1)
    if f"{at}.g_proj.weight" in T:
        o = o * _silu(u @ T[f"{at}.g_proj.weight"].T)
    return o @ T[f"{at}.o_proj.weight"].T


def _gdn(c: dict[str, Any], T: Tensors, at: str, u: Array) -> Array:
    """Gated DeltaNet: S <- S alpha (I - beta k k^T) + beta v k^T (Yang et al., equation 10)."""
    given = c.get("gdn_config", {})
    q, k, v = _qkv(T, at, u, given, False)
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    beta = _sigmoid(u @ T[f"{at}.b_proj.weight"].T) * (2 if given.get("allow_neg_eigval") else 1)
    alpha = np.exp(-np.exp(T[f"{at}.A_log"]) * _softplus(u @ T[f"{at}.gk_proj.weight"].T + T[f"{at}.dt_bias"]))
    o = np.zeros_like(q)
    for j in range(H):
        S = np.zeros((P, P))
        for i in range(len(u)):
            kk = np.outer(k[i, j], k[i, j])
            S = alpha[i, j] * S @ (np.eye(P) - beta[i, j] * kk) + beta[i, j] * np.outer(v[i, j], k[i, j])
            o[i, j] = S @ q[i, j] / np.sqrt(P)
    return _read(T, at, u, o, given.get("norm_eps", 1e-5))


def _chebyshev(A: Array, q: Array, low: float, high: float, steps: int) -> Array:
    """Chebyshev iteration for A x = q with eigenvalues in [low, high] (Saad, Iterative Methods, algorithm 12.1)."""
    theta, delta = (high + low) / 2, (high - low) / 2
    sigma = theta / delta
    rho, r, x = 1 / sigma, q.copy(), np.zeros_like(q)
    d = r / theta
    for _ in range(steps):
        x, r = x + d, r - A @ d
        new = 1 / (2 * sigma - rho)
        d, rho = new * rho * d + 2 * new / delta * r, new
    return x


def _gka(c: dict[str, Any], T: Tensors, at: str, u: Array) -> Array:
    """Gated KalmaNet: U (q + alpha (x - q)), (H + lambda I) x = q, H and U sums over all earlier tokens."""
    given, t = c.get("gka_config", {}), len(u)
    q, k, v = _qkv(T, at, u, given, not given.get("use_v_conv", True))
    q, k = (x / (np.sqrt((x * x).sum(-1, keepdims=True)) + 1e-6) for x in (q, k))
    if f"{at}.b_proj.weight" in T:
        beta = _sigmoid(u @ T[f"{at}.b_proj.weight"].T + T[f"{at}.b_proj.bias"]) + 1e-6
        k, v = k * beta[..., None], v * beta[..., None]
    g = -np.exp(T[f"{at}.A_log"]) * _softplus(u @ T[f"{at}.a_proj.weight"].T + T[f"{at}.dt_bias"])
    g = g if given.get("use_forgetting_gate", True) else np.zeros_like(g)
    eta = _decays(g)
    eta_kk = eta if given.get("use_forgetting_gate_kk", True) else _decays(np.zeros_like(g))
    share = np.ones((t, H))
    if f"{at}.alpha_proj.weight" in T:
        share = _sigmoid(u @ T[f"{at}.alpha_proj.weight"].T + T[f"{at}.alpha_proj.bias"])
    o = np.zeros_like(q)
    for j in range(H):
        for i in range(t):
            gram = np.einsum("s,sa,sb->ab", eta_kk[j, i], k[:, j], k[:, j])
            U = np.einsum("s,sa,sb->ab", eta[j, i], v[:, j], k[:, j])
            norm = np.sqrt((gram**2).sum())
            ridge = given.get("ridge_strength", 0.02) * norm
            A, steps = gram + ridge * np.eye(P), given.get("num_iter", 30)
            x = _chebyshev(
                A, q[i, j], ridge, norm + ridge, steps + 1
            )  # x_1, Saad's first step, is where it counts from
            o[i, j] = U @ (q[i, j] + share[i, j] * (x - q[i, j]))
    if given.get("gla_rescale", True):
        o = o / np.sqrt(P)
    return _read(T, at, u, o, given.get("norm_eps", 1e-6))


_MIXERS: dict[str, tuple[str, Callable[..., Array]]] = {
    "mamba2": ("mamba", _mamba2), "gdn": ("gdn", _gdn), "gated_deltanet": ("gdn", _gdn), "gka": ("gka", _gka),
    "gated_kalmanet": ("gka", _gka), "m2": ("mamba", _mamba2),
}  # fmt: skip


def logits(c: dict[str, Any], weights: Tensors, ids: Array) -> Array:
    """Logits (t, v) of a text (t,), in float64."""
    T = {name: w.astype(np.float64) for name, w in weights.items()}
    h = T["model.embed_tokens.weight"][ids]
    for i, symbol in enumerate(c["hybrid_override_pattern"].split("-")):
        at = f"model.layers.{i}"
        u = _rms(h, T[f"{at}.input_layernorm.weight"], c["rms_norm_eps"])
        if symbol == "*":
            out = _attention(c, T, f"{at}.self_attn", u, None, len(ids))
        elif symbol == "SWA":
            out = _attention(c, T, f"{at}.swa", u, None, c["swa_config"]["window_size"])
        elif symbol == "BMF":
            module, mixer = _MIXERS[c["bmojo_config"]["ssm_mixer"].lower()]
            y = mixer(c, T, f"{at}.bmojo_f.{module}", u)
            out = _attention(c, T, f"{at}.bmojo_f.bmojo_attn", u, y, c["bmojo_config"]["window_size"])
        else:
            module, mixer = _MIXERS[symbol.lower()]
            out = mixer(c, T, f"{at}.{module}", u)
        h = h + out
        u = _rms(h, T[f"{at}.post_attention_layernorm.weight"], c["rms_norm_eps"])
        up = _silu(u @ T[f"{at}.mlp.gate_proj.weight"].T) * (u @ T[f"{at}.mlp.up_proj.weight"].T)
        h = h + up @ T[f"{at}.mlp.down_proj.weight"].T
    head = T["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    return _rms(h, T["model.norm.weight"], c["rms_norm_eps"]) @ head.T
