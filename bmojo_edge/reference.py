"""B'MOJO in NumPy float64, equation by equation: the oracle every other implementation is tested against.

Slow and obviously right. Section and step numbers are those of docs/model.md. Two forms of the same layer: token by
token with bounded state (`forward`), and the definition over whole sequences (`forward_parallel`); a test proves them
equal. It knows nothing of files, tokenizers or engines.

One document of one row is computed at a time, so there is no batch axis inside and no padding to mask:
t tokens, h query heads, g key/value heads, p head_dim, w window, f n_fading, e n_eidetic, s n_sinks, n slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from bmojo_edge.config import Config
from bmojo_edge.reference_delta import gdn, gka
from bmojo_edge.reference_mamba2 import mamba2
from bmojo_edge.reference_memory import (
    Projected,
    attend,
    chunks_of,
    innovations,
    read_parallel,
    read_streaming,
    rotate,
    rows,
    slot_positions,
)
from bmojo_edge.reference_ssm import Weights, mamba, rms_norm, silu
from bmojo_edge.rope import softmax_scale, turns_per_token
from bmojo_edge.state import AttentionState, Leaf, State, capacity, map_leaves, state_spec

Array = np.ndarray

MIXERS = {"mamba": mamba, "mamba2": mamba2, "gdn": gdn, "gka": gka}


class Memory(NamedTuple):
    """What `return_memory=True` adds: innovations and eidetic sets as used.

    Chunks are counted as they come in the call: an entry starts at a row's first token, at every document and at every
    position that is a multiple of `chunk`. For a fresh row of one document the entry is position // chunk.
    """

    scores: Array  # (b, n_layers, t), 0 at padding and in layers without eidetic memory
    eidetic_index: Array  # (b, n_layers, n_chunks, e) int64 positions within the document, ascending, -1 = empty


class LayerResult(NamedTuple):
    """One layer over t tokens: its output, its state afterwards, its innovations and its sets chunk by chunk."""

    out: Array  # (t, d)
    state: Any
    scores: Array | None = None  # (t,)
    sets: Array | None = None  # (chunks, e)


# --- layers ---------------------------------------------------------------------------------------------------------


def project(config: Config, w: Weights, u: Array, y: Array | None) -> Projected:
    """Step 3: queries from u, in-context keys and values from u, fading ones from the SSM output y."""

    def heads(prefix: str, name: str, x: Array, n: int) -> Array:
        z = x @ w[f"{prefix}{name}_proj.weight"].T
        if config.attention_bias:
            z = z + w[f"{prefix}{name}_proj.bias"]
        z = z.reshape(len(x), n, config.d_head)
        return rms_norm(z, w[f"{prefix}{name}_norm.weight"], config.norm_eps) if config.qk_norm and name != "v" else z

    h, g = config.n_heads, config.kv_heads
    q, k, v = (heads("", name, u, n) for name, n in (("q", h), ("k", g), ("v", g)))
    if y is None:
        return Projected(q, k, v, q, None, None)
    prefix = "" if config.tie_kv else "fading."
    q_fading = q if config.tie_kv else heads(prefix, "q", u, h)
    return Projected(q, k, v, q_fading, heads(prefix, "k", y, g), heads(prefix, "v", y, g))


def _bmojo(
    config: Config, layer: int, w: Weights, u: Array, state: Any, at: tuple[int, int], forced: Array | None
) -> LayerResult:
    """One B'MOJO layer (section 3) without its residual; `state` None computes the parallel definition."""
    ssm, streaming = config.ssm_of(layer), state is not None
    y, ssm_state = None, ()
    if ssm is not None:
        y, ssm_state = MIXERS[ssm.kind](config, ssm, w.under("ssm."), u, state.ssm if streaming else None)
    scores, history = None, ()
    if config.n_eidetic:
        signal = y if y is not None and config.signal_of(layer) == "ssm_output" else u
        past = state.history if streaming else np.zeros((config.innovation.taps, config.d_model), u.dtype)
        scores = innovations(signal, past, config.innovation)
        history = np.concatenate([past, signal])[-config.innovation.taps :]
    x = project(config, w, u, y)
    if streaming:
        o, state, sets = read_streaming(config, x, scores, state, at, forced)
        queries = state.queries
        if len(queries):  # () without storage
            queries = np.concatenate([queries, x.q.reshape(len(u), -1)])[-len(queries) :]
        state = state._replace(history=history, ssm=ssm_state, queries=queries)
    else:
        o, sets = read_parallel(config, x, scores, at[1], forced)
    return LayerResult(o.reshape(len(u), -1) @ w["o_proj.weight"].T, state, scores, sets)


def _attention(config: Config, layer: int, w: Weights, u: Array, state: Any, at: tuple[int, int]) -> LayerResult:
    """Softmax attention over everything, or over the last attention_window tokens (section 5)."""
    (start, offset), t, turns = at, len(u), turns_per_token(config)
    x, now = project(config, w, u, None), start + np.arange(t)
    q, k = (rotate(y, now + offset, turns) for y in (x.q, x.k))
    reach = config.attention_window_of(layer)
    past, keys, values = np.arange(0), k, x.v
    if state is not None:
        held = np.arange(start) if reach is None else slot_positions(reach, start - 1)
        past, order = held[held >= 0], np.flatnonzero(held >= 0)
        keys, values = np.concatenate([rows(state.k, order), k]), np.concatenate([rows(state.v, order), x.v])
    position = np.concatenate([past, now])
    out = []
    for n, i in enumerate(now):
        seen = (position <= i) & (position > (i - reach if reach else -1))
        out.append(attend([q[n]], [keys[seen]], [values[seen]], softmax_scale(config)))
    if state is not None:
        size = reach or capacity(start + t)
        state = AttentionState(*(np.zeros((config.kv_heads, size, config.d_head), u.dtype) for _ in range(2)))
        for j in np.argsort(position)[-size:]:
            state.k[:, position[j] % size], state.v[:, position[j] % size] = keys[j], values[j]
    return LayerResult(np.stack(out).reshape(t, -1) @ w["o_proj.weight"].T, state)


def _mlp(config: Config, layer: int, w: Weights, x: Array) -> Array:
    """SwiGLU, or a mixture of such experts weighted by the softmax of the router over all of them."""
    experts = config.experts_of(layer)

    def swiglu(gate: Array, up: Array, down: Array, y: Array) -> Array:
        return (silu(y @ gate.T) * (y @ up.T)) @ down.T

    if experts is None:
        return swiglu(w["gate_proj.weight"], w["up_proj.weight"], w["down_proj.weight"], x)
    logits = x @ w["router.weight"].T
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, : experts.per_token]  # (t, per_token)
    gate, up, down = (w[f"experts.{name}_proj.weight"] for name in ("gate", "up", "down"))
    out = np.zeros_like(x)
    for n, picks in enumerate(chosen):
        for j in picks:
            out[n] += shares[n, j] * swiglu(gate[j], up[j], down[j], x[n])
    return out


def _layer(
    config: Config, layer: int, w: Weights, h: Array, state: Any, at: tuple[int, int], forced: Array | None
) -> LayerResult:
    """A mixer and its MLP, each with norm and residual; `at` is (position of the first token, offset)."""
    u, kind, mixer = rms_norm(h, w["norm.weight"], config.norm_eps), config.layer_types[layer], w.under("mixer.")
    if kind == "bmojo":
        result = _bmojo(config, layer, mixer, u, state, at, forced)
    elif kind == "attention":
        result = _attention(config, layer, mixer, u, state, at)
    else:
        ssm = config.ssm_of(layer)
        assert ssm is not None
        result = LayerResult(*MIXERS[kind](config, ssm, mixer, u, state))
    h = h + result.out
    if config.d_ff:
        h = h + _mlp(config, layer, w.under("mlp."), rms_norm(h, w["mlp_norm.weight"], config.norm_eps))
    return result._replace(out=h)


# --- models ---------------------------------------------------------------------------------------------------------


class _Document(NamedTuple):
    """Tokens begin .. end - 1 of one row."""

    row: int
    begin: int
    end: int
    start: int  # position of its first token: that of the carried state in a row's first document, else 0
    fresh: bool  # False in a row's first document: it continues the carried state
    first_chunk: int  # ordinal of its first chunk within the row
    chunks: int


def _documents(config: Config, row: int, label: Array, start: int) -> Iterator[_Document]:
    """The documents of one row: runs of one segment id in `label` (t,), where -1 is padding."""
    borders = [0, *(np.flatnonzero(label[1:] != label[:-1]) + 1), len(label)]
    first_chunk, fresh = 0, False
    for begin, end in itertools.pairwise(borders):
        if begin == end or label[begin] < 0:
            continue
        start = 0 if fresh else start
        chunks = int(chunks_of(start, end - begin, config.chunk_size)[-1]) + 1
        yield _Document(row, int(begin), int(end), start, fresh, first_chunk, chunks)
        first_chunk, fresh = first_chunk + chunks, True


def _labels(tokens: Array, segment_ids: Any, lengths: Any) -> Array:
    """Segment ids (b, t) with right padding folded in as -1."""
    if tokens.ndim != 2:
        raise ValueError(f"tokens: must have shape (b, t), got {tokens.shape}")
    labels = np.zeros(tokens.shape, np.int64) if segment_ids is None else np.asarray(segment_ids)
    if labels.shape != tokens.shape:
        raise ValueError(f"segment_ids: must have the shape of tokens {tokens.shape}, got {labels.shape}")
    if lengths is None:
        return labels
    return np.where(np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None], labels, -1)


def init_state(config: Config, batch: int = 1, offset: int = 0, dtype: Any = np.float64) -> State:
    """A fresh state of `batch` sequences, its float arrays in `dtype`."""

    def fresh(leaf: Leaf) -> Array:
        return np.full(leaf.shape, leaf.fill, np.int64 if leaf.dtype == "int64" else dtype)

    return map_leaves(fresh, state_spec(config, batch))._replace(offset=np.full(batch, offset, np.int64))


def _stack_rows(*rows: Array) -> Array:
    """Rows of one leaf as a batch; growing caches of different lengths are padded to the longest."""
    longest = max(x.shape for x in rows)
    return np.stack([np.pad(x, [(0, n - m) for n, m in zip(longest, x.shape, strict=True)]) for x in rows])


def _logits(config: Config, w: Weights, h: Array) -> Array:
    head = w["embed.weight"] if config.tie_embeddings else w["lm_head.weight"]
    return rms_norm(h, w["norm.weight"], config.norm_eps) @ head.T


def forward(
    config: Config,
    weights: Mapping[str, Array],
    tokens: Any,
    state: State | None = None,
    segment_ids: Any = None,
    lengths: Any = None,
    eidetic_index: Any = None,
    return_memory: bool = False,
    dtype: Any = np.float64,
    observe: Callable[[int, int, int, Array], None] | None = None,
) -> Any:
    """The model, token by token with bounded memories.

    tokens (b, t) ints; state from an earlier call or `init_state`, None = fresh; segment_ids (b, t): a change starts a
    document, -1 is padding, a row's first document continues `state`; lengths (b,): right padding;
    eidetic_index (b, n_layers, n_chunks, e) forces the eidetic sets (see `Memory`); dtype: of all arithmetic.
    weights maps the names of docs/checkpoints.md to arrays and is read one layer at a time; observe is called with
    (layer, row, column of the first token, output (n, d)) of every document.

    Returns (logits (b, t, v), state), and Memory as a third with `return_memory`. Logits of padding are 0.
    """
    tokens = np.asarray(tokens)
    labels = _labels(tokens, segment_ids, lengths)
    (b, t), n_layers = tokens.shape, len(config.layer_types)
    state = init_state(config, b, dtype=dtype) if state is None else state
    fresh = init_state(config, dtype=dtype)
    docs = [doc for row in range(b) for doc in _documents(config, row, labels[row], int(state.position[row]))]
    n_chunks = max((d.first_chunk + d.chunks for d in docs), default=0)
    memory = Memory(np.zeros((b, n_layers, t), dtype), np.full((b, n_layers, n_chunks, config.n_eidetic), -1))

    embed = Weights(weights, dtype)["embed.weight"]
    hidden = [embed[tokens[d.row, d.begin : d.end]] for d in docs]
    layers = []
    for i in range(n_layers):
        w = Weights(weights, dtype, f"layers.{i}.")
        carried = [map_leaves(lambda x, r=r: x[r].copy(), state.layers[i]) for r in range(b)]
        for n, d in enumerate(docs):
            if d.fresh:
                carried[d.row] = map_leaves(lambda x: x[0].copy(), fresh.layers[i])
            forced = None if eidetic_index is None else np.asarray(eidetic_index)[d.row, i, d.first_chunk :]
            result = _layer(config, i, w, hidden[n], carried[d.row], (d.start, int(state.offset[d.row])), forced)
            hidden[n], carried[d.row] = result.out, result.state
            if observe is not None:
                observe(i, d.row, d.begin, result.out)
            if result.scores is not None:
                memory.scores[d.row, i, d.begin : d.end] = result.scores
                memory.eidetic_index[d.row, i, d.first_chunk : d.first_chunk + d.chunks] = result.sets
        layers.append(map_leaves(_stack_rows, *carried))

    logits, position = np.zeros((b, t, config.vocab_size), dtype), np.array(state.position, np.int64)
    w = Weights(weights, dtype)
    for d, h in zip(docs, hidden, strict=True):
        logits[d.row, d.begin : d.end] = _logits(config, w, h)
        position[d.row] = d.start + d.end - d.begin
    state = State(tuple(layers), position, np.array(state.offset))
    return (logits, state, memory) if return_memory else (logits, state)


def forward_parallel(
    config: Config,
    weights: Mapping[str, Array],
    tokens: Any,
    offset: int = 0,
    eidetic_index: Any = None,
    dtype: Any = np.float64,
) -> tuple[Array, Memory]:
    """The definition over whole fresh sequences (section 3): no state, every set found by sorting all scores.

    tokens (b, t) ints. Returns logits (b, t, v) and Memory.
    """
    tokens = np.asarray(tokens)
    (b, t), n_layers = tokens.shape, len(config.layer_types)
    n_chunks = -(-t // config.chunk_size)
    memory = Memory(np.zeros((b, n_layers, t), dtype), np.full((b, n_layers, n_chunks, config.n_eidetic), -1))
    logits = []
    for row in range(b):
        h = Weights(weights, dtype)["embed.weight"][tokens[row]]
        for i in range(n_layers):
            forced = None if eidetic_index is None else np.asarray(eidetic_index)[row, i]
            result = _layer(config, i, Weights(weights, dtype, f"layers.{i}."), h, None, (0, offset), forced)
            h = result.out
            if result.scores is not None:
                memory.scores[row, i], memory.eidetic_index[row, i] = result.scores, result.sets
        logits.append(_logits(config, Weights(weights, dtype), h))
    return np.stack(logits), memory
