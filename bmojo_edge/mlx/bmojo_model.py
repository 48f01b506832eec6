"""B'MOJO models for mlx-lm, in one file that stands by itself: `convert` puts a copy into every model folder.

Where bmojo_edge is installed its model computes (all mixers, its kernels); elsewhere the plain MLX below gives the same
tokens for `bmojo`, `attention` and `mamba` layers, a memory going through a prompt token by token. Full attention is
always `FullAttention`, with mlx-lm's growing caches. It knows mlx-lm's caches and nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache, KVCache
from mlx_lm.models.switch_layers import SwitchLinear

LAYERS = ("bmojo", "attention", "mamba")  # what the plain model computes
FLOAT32 = (".A_log", ".D", ".dt_proj.bias", ".dt_bias")  # what the scan is made of, whatever the model's dtype
NOT_QUANTIZED = ("conv", "norm", "router", "dt_proj", "a_proj", "b_proj", "gk_proj")


class ModelArgs(SimpleNamespace):
    """The fields of config.json, which `convert` writes in full."""

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """All fields, those of other programs too."""
        return cls(**config)


def attention_window(args: Any, layer: int) -> int | None:
    """The reach of an attention layer, None = everything."""
    reach = args.attention_window
    return reach[layer] if isinstance(reach, list | tuple) else reach


def grows(args: Any, layer: int) -> bool:
    """Whether a layer is full attention."""
    return args.layer_types[layer] == "attention" and attention_window(args, layer) is None


def has_ssm(args: Any, layer: int) -> bool:
    """Whether a bmojo layer has a state-space mixer."""
    return args.ssm is not None and (args.ssm_layers is None or layer in args.ssm_layers)


def memory_shapes(args: Any, layer: int, b: int, dtype: mx.Dtype) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
    """Shape and dtype of the arrays in a layer's cache, in their order there; all begin as zeros.

    `positions` counts from 1 here, 0 = empty slot: mlx-lm fills the rows of empty caches with zeros.
    """
    kind, f32 = args.layer_types[layer], mx.float32

    def slots(name: str, n: int) -> dict[str, Any]:
        return {f"{name}.{leaf}": ((b, args.n_kv_heads, n, args.head_dim), dtype) for leaf in "kv"}

    def ssm() -> dict[str, Any]:
        d = args.ssm["expand"] * args.d_model
        conv = ((b, args.ssm["d_conv"] - 1, d), dtype)
        return {"conv": conv, "ssm": ((b, d, args.ssm["d_state"]), f32)}

    found: dict[str, Any] = {"position": ((b,), mx.int64)}
    if kind == "attention":
        return found | slots("window", attention_window(args, layer) or 0)
    if kind == "mamba":
        return found | ssm()
    w, e, inside = args.window, args.n_eidetic, has_ssm(args, layer)
    found |= slots("window", w) | ({"window.scores": ((b, w), f32)} if e else {})
    if inside and args.n_fading:
        found |= slots("fading", w + args.n_fading)
    if args.n_sinks:
        found |= slots("sinks", args.n_sinks)
    if e:
        found |= slots("eidetic", e) | {"eidetic.scores": ((b, e), f32), "eidetic.positions": ((b, e), mx.int64)}
        found |= {"history": ((b, args.innovation["taps"], args.d_model), f32)}
    return found | (ssm() if inside else {})


class Run:
    """Positions of a call's tokens (b, t) after those of the caches, and which of them are real."""

    def __init__(self, caches: list[Any], b: int, t: int) -> None:
        memory = next((c for c in caches if isinstance(c, ArraysCache)), None)
        start = None if memory is None else memory[0]
        self.t = t
        self.start = np.zeros(b, np.int64) if start is None else np.array(start)
        given = None if memory is None else memory.lengths
        self.lengths = np.full(b, t) if given is None else np.clip(np.array(given), 0, t)
        padding = None if memory is None else memory.left_padding
        if padding is not None and (np.array(padding) > 0).any():
            raise ValueError("left_padding: these memories take right padding only (`prepare(lengths=...)`)")
        self.end = mx.array(self.start + self.lengths)
        self.host_position = self.start[:, None] + np.arange(t)
        self.host_real: Any = np.arange(t) < self.lengths[:, None]
        self.position, self.real = mx.array(self.host_position), mx.array(self.host_real)

    def last(self, x: mx.array, n: int) -> mx.array:
        """The n entries of x (b, n + t, d) that end with each row's last real token."""
        index = mx.array(self.lengths)[:, None] + mx.arange(n)
        return mx.take_along_axis(x, index[..., None], axis=1)


def put(slots: mx.array, value: mx.array, position: mx.array, real: mx.array) -> mx.array:
    """Slots (b, g, n, p) or (b, n) with `value`, of one slot, at position mod n of the rows that are `real` (b,)."""
    n = slots.shape[-1] if slots.ndim == 2 else slots.shape[2]
    here = (mx.arange(n) == (position % n)[:, None]) & real[:, None]
    return mx.where(here if slots.ndim == 2 else here[:, None, :, None], value, slots)


def turns_per_token(args: Any) -> mx.array | None:
    """Turns a token of each pair of dimensions, in 2^-64 of a turn, (p / 2,) uint64; None without positions."""
    if args.rope_theta is None:
        return None
    p, theta = args.head_dim, args.rope_theta
    s: dict[str, Any] = args.rope_scaling or {"rope_type": "default"}
    freq = theta ** (-np.arange(0, p, 2, dtype=np.float64) / p)
    if s["rope_type"] == "linear":
        freq = freq / s["factor"]
    elif s["rope_type"] == "llama3":
        turns = s["original_max_position_embeddings"] * freq / (2 * np.pi)
        smooth = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        smooth = np.clip(smooth, 0.0, 1.0)
        freq = (1 - smooth) * freq / s["factor"] + smooth * freq
    elif s["rope_type"] == "yarn":  # arXiv 2309.00071, section 3.2
        context = s["original_max_position_embeddings"]
        turns = (s["beta_fast"], s["beta_slow"])
        ends = [p * math.log(context / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in turns]
        low, high = (math.floor(ends[0]), math.ceil(ends[1])) if s["truncate"] else ends
        low, high = max(low, 0), min(high, p - 1)
        ramp = np.clip((np.arange(p // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
        freq = freq / s["factor"] * ramp + freq * (1 - ramp)
    elif s["rope_type"] != "default":
        raise ValueError(f"rope_scaling.rope_type: {s['rope_type']!r} is not one this file knows")
    return mx.array(np.round(freq / (2 * np.pi) * 2.0**64).astype(np.uint64))


def softmax_scale(args: Any) -> float:
    """1 / sqrt(p), times the square of YaRN's attention factor."""
    s, scale = args.rope_scaling, args.head_dim**-0.5
    if s is None or s["rope_type"] != "yarn":
        return scale
    if s["attention_factor"] is not None:
        return scale * s["attention_factor"] ** 2

    def magnitude(mscale: float) -> float:
        return 1.0 if s["factor"] <= 1 else 0.1 * mscale * math.log(s["factor"]) + 1.0

    if s["mscale"] and s["mscale_all_dim"]:
        return scale * (magnitude(s["mscale"]) / magnitude(s["mscale_all_dim"])) ** 2
    return scale * magnitude(1.0) ** 2


def rotate(x: mx.array, position: mx.array, turns: mx.array | None, inverse: bool = False) -> mx.array:
    """x (b, heads, t, p) rotated at position (b, t) int64, as a fraction of a turn: it may run for ever."""
    if turns is None:
        return x
    phase = (position[..., None].astype(mx.uint64) * turns).view(mx.int64)
    angle = (phase.astype(mx.float32) * (2 * math.pi / 2.0**64))[:, None]
    cos, sin = mx.cos(angle), -mx.sin(angle) if inverse else mx.sin(angle)
    a, b = mx.split(x.astype(mx.float32), 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Projections(nn.Module):
    """Queries, keys and values by head, with optional norms."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        p, bias = args.head_dim, args.attention_bias
        self.p = p
        self.q_proj = nn.Linear(args.d_model, args.n_heads * p, bias=bias)
        self.k_proj = nn.Linear(args.d_model, args.n_kv_heads * p, bias=bias)
        self.v_proj = nn.Linear(args.d_model, args.n_kv_heads * p, bias=bias)
        if args.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(p, args.norm_eps), nn.RMSNorm(p, args.norm_eps)

    def heads(self, name: str, x: mx.array) -> mx.array:
        """(b, heads, t, p) of x (b, t, d); name: q, k or v."""
        y = self[f"{name}_proj"](x).reshape(*x.shape[:2], -1, self.p)
        return (self[f"{name}_norm"](y) if f"{name}_norm" in self else y).swapaxes(1, 2)


class FullAttention(Projections):
    """Attention over everything, with mlx-lm's own cache."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.o_proj = nn.Linear(args.n_heads * args.head_dim, args.d_model, bias=False)
        self.scale, self._turns = softmax_scale(args), turns_per_token(args)

    def __call__(self, u: mx.array, cache: Any) -> mx.array:
        """u (b, t, d) after what the cache holds."""
        b, t, _ = u.shape
        start = mx.array(cache.offset).astype(mx.int64).reshape(-1, 1)  # a number, or one a row
        position = mx.broadcast_to(start + mx.arange(t, dtype=mx.int64), (b, t))
        mask: Any = create_attention_mask(u, cache)
        q, k = (rotate(self.heads(name, u), position, self._turns) for name in "qk")
        k, v = cache.update_and_fetch(k, self.heads("v", u))
        o = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(o.swapaxes(1, 2).reshape(b, t, -1))


class Mamba(nn.Module):
    """Mamba-1 (arXiv 2312.00752), with Jamba's optional norms."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        ssm = args.ssm
        d, d_inner, n = args.d_model, ssm["expand"] * args.d_model, ssm["d_state"]
        self.split = (ssm["dt_rank"], ssm["dt_rank"] + n)
        self.in_proj = nn.Linear(d, 2 * d_inner, bias=ssm["bias"])
        self.conv: Any = nn.Module()
        self.conv.weight = mx.zeros((d_inner, ssm["d_conv"]))
        if ssm["conv_bias"]:
            self.conv.bias = mx.zeros(d_inner)
        self.x_proj = nn.Linear(d_inner, ssm["dt_rank"] + 2 * n, bias=False)
        self.dt_proj = nn.Linear(ssm["dt_rank"], d_inner)
        self.out_proj = nn.Linear(d_inner, d, bias=ssm["bias"])
        if ssm["dt_bc_norm"]:
            sizes = (ssm["dt_rank"], n, n)
            self.dt_norm, self.B_norm, self.C_norm = (nn.RMSNorm(size, args.norm_eps) for size in sizes)
        self.A_log, self.D = mx.zeros((d_inner, n)), mx.ones(d_inner)

    def __call__(self, u: mx.array, state: dict[str, mx.array], run: Run) -> mx.array:
        """u (b, t, d): the output in float32, as innovation looks at it; changes state["conv"] and state["ssm"]."""
        x, z = mx.split(self.in_proj(u), 2, axis=-1)
        taps = self.conv.weight.shape[1]
        padded, bias = mx.concatenate([state["conv"], x], axis=1), self.conv.bias if "bias" in self.conv else 0
        x = nn.silu(sum(padded[:, j : j + run.t] * self.conv.weight[:, j] for j in range(taps)) + bias)
        state["conv"] = run.last(padded, taps - 1)
        dt, B, C = mx.split(self.x_proj(x), self.split, axis=-1)
        if "dt_norm" in self:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        dt = nn.softplus(self.dt_proj(dt.astype(mx.float32)))
        dt = mx.where(run.real[..., None], dt, 0.0)  # padding leaves the state as it is
        A, wide, S, out = -mx.exp(self.A_log.astype(mx.float32)), x.astype(mx.float32), state["ssm"], []
        for i in range(run.t):
            S = mx.exp(dt[:, i, :, None] * A) * S + (dt[:, i] * wide[:, i])[..., None] * B[:, i, None]
            out.append((S * C[:, i, None]).sum(-1))
        state["ssm"] = S
        y = (mx.stack(out, axis=1) + self.D * wide) * nn.silu(z.astype(mx.float32))
        return self.out_proj(y.astype(u.dtype).astype(mx.float32))


class Memories(Projections):
    """One softmax over in-context, fading and eidetic memory; a windowed attention layer has the first alone."""

    def __init__(self, args: Any, layer: int) -> None:
        super().__init__(args)
        self.o_proj = nn.Linear(args.n_heads * args.head_dim, args.d_model, bias=False)
        self.plain = args.layer_types[layer] == "attention"
        self.window: int = (attention_window(args, layer) or 0) if self.plain else args.window
        self.eidetic, self.sinks = (0, 0) if self.plain else (args.n_eidetic, args.n_sinks)
        self.chunk, self.innovation = args.chunk, args.innovation
        self.scale, self._turns = softmax_scale(args), turns_per_token(args)
        if not self.plain and has_ssm(args, layer):
            self.ssm = Mamba(args)
            if not args.tie_kv:
                self.fading = Projections(args)
        self.reads_input = self.eidetic > 0 and ("ssm" not in self or self.innovation["signal"] == "input")

    def __call__(self, u: mx.array, state: dict[str, mx.array], run: Run, dtype: mx.Dtype) -> mx.array:
        """u (b, t, d), in float32 where the input is what innovation looks at; changes the state."""
        signal, u, y = u, u.astype(dtype), None
        if "ssm" in self:
            wide = self.ssm(u, state, run)
            signal, y = signal if self.reads_input else wide, wide.astype(dtype)
        scores = self.scores(signal.astype(mx.float32), state, run) if self.eidetic else None
        x = {name: self.heads(name, u) for name in "qkv"}
        if y is not None and "fading.k" in state:
            other: Any = self.fading if "fading" in self else self
            x |= {"qf": other.heads("q", u), "kf": other.heads("k", y), "vf": other.heads("v", y)}
        o = self.attend(x, scores, state, run)  # (b, t, h p)
        return self.o_proj(o)

    def scores(self, signal: mx.array, state: dict[str, mx.array], run: Run) -> mx.array:
        """How badly a fixed average of the past predicts the signal: (b, t)."""
        taps = self.innovation["taps"]
        padded, miss, total = mx.concatenate([state["history"], signal], axis=1), signal, 2 - 0.5 ** (taps - 1)
        for j in range(taps):
            miss = miss - 0.5**j / total * padded[:, taps - 1 - j : taps - 1 - j + run.t]
        state["history"] = run.last(padded, taps)
        found = miss.square().sum(-1)
        return found / (signal.square().sum(-1) + 1e-6) if self.innovation["error"] == "relative" else found

    def promote(self, state: dict[str, mx.array], position: mx.array, due: mx.array) -> None:
        """In rows that are `due`, the tokens that leave the window in this chunk compete for the eidetic slots."""
        w, e, old = self.window, self.eidetic, {n: state[f"eidetic.{n}"] for n in ("k", "v", "scores", "positions")}
        leaving = (position - w)[:, None] + mx.arange(self.chunk, dtype=mx.int64)
        slot = leaving % w
        k, v = (mx.take_along_axis(state[f"window.{n}"], slot[:, None, :, None], axis=2) for n in "kv")
        k = mx.concatenate([old["k"], rotate(k, leaving, self._turns, inverse=True)], axis=2)
        v = mx.concatenate([old["v"], v], axis=2)
        scores = mx.concatenate([old["scores"], mx.take_along_axis(state["window.scores"], slot, axis=1)], axis=1)
        positions = mx.concatenate([old["positions"], leaving + 1], axis=1)
        n = positions.shape[1]
        # Bits of non-negative floats order as the floats do; below them the column, so that ties go to the earlier.
        key = scores.view(mx.int32).astype(mx.int64) * 2**32 + (n - mx.arange(n, dtype=mx.int64))
        key = mx.where(positions > self.sinks, key, 0)
        best = mx.argsort(-key, axis=-1)[:, :e]
        best = mx.sort(mx.where(mx.take_along_axis(key, best, axis=-1) > 0, best, n), axis=-1)
        full, column = best < n, mx.minimum(best, n - 1)
        wide_full, wide = full[:, None, :, None], column[:, None, :, None]
        new = {name: mx.where(wide_full, mx.take_along_axis(x, wide, axis=2), 0) for name, x in (("k", k), ("v", v))}
        for name, x in (("scores", scores), ("positions", positions)):
            new[name] = mx.where(full, mx.take_along_axis(x, column, axis=1), 0)
        for name, x in new.items():
            rows = due.reshape(-1, *(1,) * (x.ndim - 1))
            state[f"eidetic.{name}"] = mx.where(rows, x.astype(old[name].dtype), old[name])

    def attend(self, x: dict[str, mx.array], scores: mx.array | None, state: dict[str, mx.array], run: Run) -> mx.array:
        """Every token in turn: promotion, rings written, one softmax over what it may see."""
        w, b, out = self.window, len(run.start), []
        at = {"q": x["q"], "k": x["k"]} | {name: x[name] for name in ("qf", "kf") if name in x}
        at = {name: rotate(y, run.position, self._turns) for name, y in at.items()}
        pinned = rotate(x["q"], mx.full((b, run.t), w, mx.int64), self._turns)
        for i in range(run.t):
            p, real, here = run.position[:, i], run.real[:, i], slice(i, i + 1)
            due: Any = run.host_real[:, i] & (run.host_position[:, i] % self.chunk == 0)
            if scores is not None and due.any():
                self.promote(state, p, mx.array(due))
            if scores is not None:
                state["window.scores"] = put(state["window.scores"], scores[:, here], p, real)
            written = {"window.k": at["k"], "window.v": x["v"]}
            if "kf" in x:
                written |= {"fading.k": at["kf"], "fading.v": x["vf"]}
            for name, y in written.items():
                state[name] = put(state[name], y[:, :, here], p, real)
            if self.sinks:
                first = real & (p < self.sinks)
                for n in "kv":
                    state[f"sinks.{n}"] = put(state[f"sinks.{n}"], x[n][:, :, here], p, first)
            out.append(self._read(state, at, pinned, p, here))
        return mx.stack(out, axis=1)

    def _read(
        self, state: dict[str, mx.array], at: dict[str, mx.array], pinned: mx.array, p: mx.array, here: slice
    ) -> mx.array:
        """One token at p (b,) over all memories: (b, h p)."""
        w, seen = self.window, []

        def ring(name: str, q: mx.array, near: int) -> None:
            n = state[f"{name}.k"].shape[2]
            held = p[:, None] - (p[:, None] - mx.arange(n)) % n
            seen.append((q, name, (held >= 0) & (held <= p[:, None] - near)))

        ring("window", at["q"], 0)
        if "kf" in at:
            ring("fading", at["qf"], w)
        if self.sinks:
            seen.append((pinned, "sinks", mx.arange(self.sinks) <= p[:, None] - w))
        if self.eidetic:
            positions = state["eidetic.positions"] - 1
            seen.append((pinned, "eidetic", (positions >= 0) & (positions <= p[:, None] - w)))
        logits = []
        for q, name, visible in seen:
            k = state[f"{name}.k"]
            grouped = q[:, :, here].reshape(k.shape[0], k.shape[1], -1, self.p)  # (b, g, h / g, p)
            found = (grouped @ k.swapaxes(-1, -2)).astype(mx.float32) * self.scale
            logits.append(mx.where(visible[:, None, None], found, -mx.inf))
        shares = mx.softmax(mx.concatenate(logits, axis=-1), axis=-1)
        v = mx.concatenate([state[f"{name}.v"] for _, name, _ in seen], axis=2)
        return (shares.astype(v.dtype) @ v).reshape(len(p), -1)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(args.d_model, args.d_ff, bias=False)
        self.up_proj = nn.Linear(args.d_model, args.d_ff, bias=False)
        self.down_proj = nn.Linear(args.d_ff, args.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    """The likeliest experts, weighted by the softmax of the router over all of them (Jamba)."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        n, self.per_token = args.experts["n"], args.experts["per_token"]
        self.router = nn.Linear(args.d_model, n, bias=False)
        self.experts: Any = nn.Module()
        self.experts.gate_proj = SwitchLinear(args.d_model, args.d_ff, n, bias=False)
        self.experts.up_proj = SwitchLinear(args.d_model, args.d_ff, n, bias=False)
        self.experts.down_proj = SwitchLinear(args.d_ff, args.d_model, n, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        shares = mx.softmax(self.router(x.astype(mx.float32)), axis=-1)
        chosen = mx.argsort(-shares, axis=-1)[..., : self.per_token]
        y, e = x[..., None, None, :], self.experts
        y = e.down_proj(nn.silu(e.gate_proj(y, chosen)) * e.up_proj(y, chosen), chosen)[..., 0, :]
        weights = mx.take_along_axis(shares, chosen, axis=-1)[..., None]
        return (y.astype(mx.float32) * weights).sum(-2).astype(x.dtype)


class Block(nn.Module):
    """h + mixer(norm(h)), then, where d_ff > 0, h + mlp(norm(h))."""

    def __init__(self, args: Any, layer: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(args.d_model, args.norm_eps)
        mixer = Mamba(args) if args.layer_types[layer] == "mamba" else None
        self.mixer: Any = mixer or (FullAttention(args) if grows(args, layer) else Memories(args, layer))
        if args.d_ff:
            mixed = args.experts is not None and layer in args.experts["layers"]
            self.mlp_norm = nn.RMSNorm(args.d_model, args.norm_eps)
            self.mlp = MixtureOfExperts(args) if mixed else MLP(args)
        self._shapes: Callable[..., Any] = lambda b, dtype: memory_shapes(args, layer, b, dtype)

    def __call__(self, h: mx.array, cache: Any, run: Run) -> mx.array:
        """h (b, t, d); the cache moves on."""
        mixer = self.mixer
        if isinstance(mixer, FullAttention):
            h = h + mixer(self.norm(h), cache)
        else:
            shapes = self._shapes(h.shape[0], h.dtype)
            values = [mx.zeros(*shape) for shape in shapes.values()] if cache.empty() else cache.cache
            state = dict(zip(shapes, values, strict=True))
            if isinstance(mixer, Mamba):
                out = mixer(self.norm(h), state, run).astype(h.dtype)
            else:
                out = mixer(self.norm(h.astype(mx.float32) if mixer.reads_input else h), state, run, h.dtype)
            h, state["position"] = h + out, run.end
            cache.cache = list(state.values())
            cache.advance(run.t)
            if run.t > 1:
                mx.eval(h, cache.cache)  # a long prompt's graph of single tokens stays that of one layer
        return h + self.mlp(self.mlp_norm(h)) if "mlp" in self else h


class PlainModel(nn.Module):
    """The whole model in plain MLX, parameters named as in the folder."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        inner = {args.ssm["kind"]} if args.ssm and "bmojo" in args.layer_types else set()
        missing = sorted({*args.layer_types, *inner} - set(LAYERS))
        if missing:
            raise ValueError(f"layer_types: {', '.join(missing)} layers need bmojo_edge: pip install bmojo-edge")
        self.args, self.model_type = args, "bmojo"
        self.embed = nn.Embedding(args.vocab_size, args.d_model)
        self.layers = [Block(args, i) for i in range(len(args.layer_types))]
        self.norm = nn.RMSNorm(args.d_model, args.norm_eps)
        if not args.tie_embeddings:
            self.lm_head = nn.Linear(args.d_model, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Logits (b, t, v) of inputs (b, t) after the cache, which moves on."""
        cache = self.make_cache() if cache is None else cache
        h, run = self.embed(inputs), Run(cache, *inputs.shape)
        for layer, c in zip(self.layers, cache, strict=True):
            h = layer(h, c, run)
        h = self.norm(h)
        return self.lm_head(h) if "lm_head" in self else self.embed.as_linear(h)

    def make_cache(self) -> list[Any]:
        """An empty cache for each layer: mlx-lm's own classes, so that it can save, merge and split them."""
        sizes = [len(memory_shapes(self.args, i, 1, mx.float32)) for i in range(len(self.layers))]
        return [KVCache() if grows(self.args, i) else ArraysCache(size) for i, size in enumerate(sizes)]

    def quant_predicate(self, path: str, module: nn.Module) -> bool:
        """Which layers `mlx_lm.convert -q` packs: those bmojo_edge packs."""
        return not any(word in path.rpartition(".")[2] for word in NOT_QUANTIZED)

    def cast_predicate(self, name: str) -> bool:
        """Which parameters `mlx_lm.convert --dtype` casts."""
        return not f".{name}".endswith(FLOAT32)


def Model(args: Any) -> nn.Module:
    """The model mlx-lm runs: bmojo_edge's where that is installed, else the plain one."""
    try:
        from bmojo_edge.mlx.mlx_lm_engine import EngineModel
    except ModuleNotFoundError as error:
        if error.name != "bmojo_edge":
            raise
        return PlainModel(args)
    return EngineModel(args)
