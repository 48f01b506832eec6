"""The model in MLX: embedding, layers, head, and the ways to move its state.

A state is a value: no call changes the one it is given. Rebind it (`logits, state = ...`) before evaluating, and rings
are written where they are; one that is still held is copied once. Nothing here knows files or tokenizers beyond
holding one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx import nn

from bmojo_edge.config import Config
from bmojo_edge.mlx.block import Block
from bmojo_edge.mlx.decode import Decoder
from bmojo_edge.mlx.layers import RMSNorm
from bmojo_edge.mlx.layout import Layout, layout_of
from bmojo_edge.mlx.mixers import Mamba, Mamba2, Remembered
from bmojo_edge.mlx.recalled import packed_window, unpacked_blocks, window_tokens
from bmojo_edge.state import Leaf, State, attending, map_leaves, state_spec
from bmojo_edge.storage_blocks import Shape

PREFILL_BLOCK = 512  # tokens of a prompt that are computed at one time


class Memory(NamedTuple):
    """What the eidetic memory did in a call, chunks counted as `reference.Memory` counts them."""

    scores: mx.array  # (b, n_layers, t), 0 at padding and in layers without eidetic memory
    eidetic_index: mx.array  # (b, n_layers, n_chunks, e) int64 positions, ascending, -1 = empty


class _Run(NamedTuple):
    """All that a run through the layers yields."""

    out: mx.array  # (b, t, d) what the head reads, 0 at padding
    state: State
    remembered: list[Remembered | None]  # a layer
    layout: Layout


def dtype_of(config: Config) -> mx.Dtype:
    """The MLX dtype a config names."""
    return getattr(mx, config.dtype)


class Model(nn.Module):
    """A language model of `bmojo`, `attention` and state-space layers; parameters as docs/checkpoints.md names them.

    Parameters are in `config.dtype`, but those of the scan (A_log, D, dt_bias, dt_proj.bias), which are float32.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        dtype = dtype_of(config)
        self.config = config
        self.tokenizer: Any = None
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.embed.set_dtype(dtype)
        self.layers = [Block(config, i, dtype) for i in range(len(config.layer_types))]
        self.norm = RMSNorm(config.d_model, config.norm_eps, dtype)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
            self.lm_head.set_dtype(dtype)
        self.initialise()
        self.decoder = Decoder(self)

    def initialise(self) -> None:
        """The initialisation of Mamba's code (state-spaces/mamba), which the paper trains with, for every layer.

        Linear weights keep MLX's default, uniform within 1 / sqrt(fan in); biases are 0 but dt's; embeddings are
        normal with deviation 0.02; projections into the residual stream are divided by the square root of their
        number, as in GPT-2. dt_proj, A_log and D are drawn where they are made, see mixers/mamba.py.
        """
        self.embed.weight = (mx.random.normal(self.embed.weight.shape) * 0.02).astype(self.embed.weight.dtype)
        into_residual = []
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and "bias" in module and not name.endswith("dt_proj"):
                module.bias = mx.zeros_like(module.bias)
            if isinstance(module, Block):
                mixer = module.mixer
                into_residual.append(mixer.out_proj if isinstance(mixer, Mamba | Mamba2) else mixer.o_proj)
                if "mlp" in module:
                    mlp: Any = module.mlp
                    into_residual.append((mlp.experts if "experts" in mlp else mlp).down_proj)
        for layer in into_residual:
            layer.weight = layer.weight / math.sqrt(len(into_residual))

    # --- states -------------------------------------------------------------------------------------------------------

    def init_state(self, batch: int = 1, offset: int = 0) -> State:
        """A fresh state of `batch` sequences, whose rotary positions begin at `offset`."""

        def fresh(leaf: Leaf) -> mx.array:
            return mx.full(leaf.shape, leaf.fill, getattr(mx, leaf.dtype))

        state = map_leaves(fresh, state_spec(self.config, batch))
        return state._replace(position=_int64([0] * batch), offset=_int64([offset] * batch))

    def reset(self, state: State, rows: Any) -> State:
        """A state whose `rows` (b,), bool, start anew at their offset; the others go on."""
        chosen = np.asarray(rows, bool)
        fresh, mask = self.init_state(chosen.size), mx.array(chosen)

        def restarted(old: mx.array, new: mx.array) -> mx.array:
            if new.shape != old.shape:  # a cache that has grown
                new = mx.zeros_like(old)
            return mx.where(mask.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        layers = map_leaves(restarted, state.layers, fresh.layers)
        return State(layers, _int64(np.where(chosen, 0, np.array(state.position))), state.offset)

    # --- many tokens --------------------------------------------------------------------------------------------------

    def forward(
        self, tokens: Any, state: State | None = None, lengths: Any = None, eidetic_index: Any = None
    ) -> tuple[mx.array, State]:
        """Logits (b, t, v) of tokens (b, t) after `state`, and the state after them; state None is a fresh one.

        lengths (b,): right padding; eidetic_index (b, n_layers, n_chunks, e) forces the eidetic sets. Logits of padding
        are 0.
        """
        out, state = self.hidden(tokens, state, lengths, eidetic_index)
        return self.head(out), state

    def __call__(self, tokens: Any, state: State | None = None, lengths: Any = None) -> tuple[mx.array, State]:
        return self.forward(tokens, state, lengths)

    def hidden(
        self, tokens: Any, state: State | None = None, lengths: Any = None, eidetic_index: Any = None
    ) -> tuple[mx.array, State]:
        """`forward` without the head: normalised activations (b, t, d) in place of logits."""
        run = self._run(tokens, state, lengths, eidetic_index)
        return run.out, run.state

    def forward_with_memory(
        self, tokens: Any, state: State | None = None, lengths: Any = None, eidetic_index: Any = None
    ) -> tuple[mx.array, State, Memory]:
        """`forward`, with innovations and eidetic sets as they were used."""
        run = self._run(tokens, state, lengths, eidetic_index)
        return self.head(run.out), run.state, self._memory(run)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., v) of normalised activations (..., d)."""
        return self.lm_head(hidden) if "lm_head" in self else self.embed.as_linear(hidden)

    def _run(
        self,
        tokens: Any,
        state: State | None,
        lengths: Any,
        eidetic_index: Any,
        watch: list[dict[str, mx.array]] | None = None,
    ) -> _Run:
        tokens, counts = self._tokens(tokens, lengths)
        b, t = tokens.shape
        state = self.init_state(b) if state is None else state
        _check_rows(state, b)
        layout = layout_of(self.config, t, state.position.tolist(), state.offset, counts)
        layout.watch = watch
        forced = self._forced(eidetic_index, layout)
        h, states, remembered = _masked(self.embed(_masked(tokens, layout.real)), layout.real), [], []
        for i, layer in enumerate(self.layers):
            result = layer(h, state.layers[i], layout, None if forced is None else forced[:, i])
            h = result.out
            states.append(result.state)
            remembered.append(result.remembered)
        position = _int64(layout.last_position + 1)
        return _Run(
            _masked(self.norm(h), layout.real), State(tuple(states), position, state.offset), remembered, layout
        )

    def _tokens(self, tokens: Any, lengths: Any) -> tuple[mx.array, list[int]]:
        """Tokens (b, t), and how many of each row are real."""
        shape = tokens.shape if isinstance(tokens, mx.array) else np.shape(tokens)
        if len(shape) != 2 or not shape[1]:
            raise ValueError(f"tokens: must have shape (b, t) with t >= 1, got {tuple(shape)}")
        counts = _lengths(lengths, *shape)
        real = np.arange(shape[1]) < np.array(counts)[:, None]
        return integers(tokens, "tokens", 2, self.config.vocab_size, real), counts

    def _memory(self, run: _Run) -> Memory:
        """One array of all layers; those without eidetic memory have zeros and empty sets."""
        layout, e = run.layout, self.config.n_eidetic
        b, c = layout.used.shape
        c = c if (layout.length > 0).any() else 0
        no_scores, no_sets = mx.zeros((b, layout.t)), mx.full((b, c, e), -1, mx.int64)
        scores = [no_scores if r is None else _masked(r.scores, layout.real) for r in run.remembered]
        sets = [no_sets if r is None else r.sets[:, :c] for r in run.remembered]
        return Memory(mx.stack(scores, axis=1), mx.stack(sets, axis=1))

    def _forced(self, eidetic_index: Any, layout: Layout) -> mx.array | None:
        """Forced sets with as many chunks as the layout counts."""
        if eidetic_index is None or not self.config.n_eidetic:
            return None
        index = integers(eidetic_index, "eidetic_index", 4)
        (b, c), n_layers, e = layout.used.shape, len(self.layers), self.config.n_eidetic
        if index.shape[:2] != (b, n_layers) or index.shape[3] != e:
            raise ValueError(f"eidetic_index: must have shape ({b}, {n_layers}, chunks, {e}), got {index.shape}")
        missing = max(0, c - index.shape[2])
        return mx.pad(index, [(0, 0), (0, 0), (0, missing), (0, 0)], constant_values=-1)[:, :, :c]

    # --- inference ----------------------------------------------------------------------------------------------------

    def prefill(self, tokens: Any, state: State, lengths: Any = None) -> tuple[mx.array, State]:
        """Logits (b, v) of each row's last real token of a prompt (b, t), and the state; 0 in rows of length 0.

        Works in blocks that end on the grid of chunks where rows agree: memory does not grow with t, but for the caches
        of full-attention layers.
        """
        tokens, counts = self._tokens(tokens, lengths)
        (b, t), chunk = tokens.shape, self.config.chunk_size
        _check_rows(state, b)
        last, ragged = mx.zeros((b, self.config.d_model), self.norm.weight.dtype), min(counts) < t
        size, begin, left = -(-PREFILL_BLOCK // chunk) * chunk, 0, None
        end = size - int(state.position.max()) % chunk
        while begin < max(counts):
            if ragged:
                left = [min(max(n - begin, 0), min(end, t) - begin) for n in counts]
            out, state = self.hidden(tokens[:, begin:end], state, left)
            last = out[:, -1] if left is None else _last(out, left, last)
            begin, end = end, end + size
            if begin < max(counts):
                mx.eval(last, state)  # before the next block: memory stays that of one
        return self.head(last), state

    def prefill_with_attention(self, tokens: Any, state: State) -> tuple[mx.array, State, list[dict[str, mx.array]]]:
        """`prefill` in one block, with the share of each token's attention that each memory got in each layer.

        A layer's shares are (b, h, t) by the names of `state.MEMORIES`, together 1; layers without attention have none.
        """
        watch: list[dict[str, mx.array]] = []
        run = self._run(tokens, state, None, None, watch)
        found = iter(watch)
        return self.head(run.out[:, -1]), run.state, [next(found) if a else {} for a in attending(self.config)]

    def window_tokens(self, state: State, begin: int, count: int, layers: Sequence[int]) -> np.ndarray:
        """Keys, unrotated, and values of the tokens at positions begin .. begin + count - 1 of every row.

        The window of each of the `layers` must still hold them. (layers, 2, b, g, count, p) in NumPy: float16 where the
        model is in half precision, else float32.
        """
        position = mx.broadcast_to(mx.arange(begin, begin + count, dtype=mx.int64), (len(state.position), count))
        found = [window_tokens(self.config, state.layers[i].window, position, state.offset) for i in layers]
        tokens = mx.stack([mx.stack(list(pair)) for pair in found])
        return np.array(tokens.astype(mx.float32 if tokens.itemsize > 2 else mx.float16))

    def window_blocks(self, state: State, begin: int, count: int, shape: Shape) -> mx.array:
        """The blocks of tokens begin .. begin + count - 1 of every row, as `storage_blocks.packed` has them, as bytes.

        Rows stand at one position, and the window of each of the shape's layers must still hold the tokens.
        """
        windows = [state.layers[i].window for i in shape.layers]
        router = state.layers[shape.router].window
        return packed_window(self.config, windows, router, begin, count, state.offset, shape)

    def recalled_blocks(self, payloads: np.ndarray, shape: Shape) -> list[mx.array]:
        """Keys, values (b, g, n * block, p), of each layer, of blocks (b, n, payload_bytes) that were read back."""
        return unpacked_blocks(mx.array(payloads), shape, self.norm.weight.dtype)

    def block_scorer(self) -> None:
        """None: NumPy scores blocks, MLX is not asked from other threads."""

    def decode_one_token(self, token: Any, state: State, active: Any = None) -> tuple[mx.array, State]:
        """Logits (b, v) after one token (b,) of each row, and the state.

        Rows with `active` (b,) False keep their state; their logits are 0. Evaluate logits and state together after
        rebinding both. Under a trace of `mx.compile` positions stay on the device; `active` and full attention then
        cannot be used.
        """
        counted = None if active is None or isinstance(active, mx.array) else np.asarray(active, bool)
        token = integers(token, "token", 1, self.config.vocab_size, counted)
        _check_rows(state, token.size)
        return self.decoder(token, state, active)


def integers(x: Any, name: str, dims: int, below: int | None = None, counted: Any = None) -> mx.array:
    """An array of integers of so many dimensions; ValueError naming it otherwise.

    Values given on the host (lists, NumPy) must be in 0 .. below - 1 where `counted`; an array of MLX is not looked at.
    """
    if isinstance(x, mx.array):
        kind, integral, shape = x.dtype, mx.issubdtype(x.dtype, mx.integer), x.shape
    else:
        x = np.asarray(x)
        kind, integral, shape = x.dtype, np.issubdtype(x.dtype, np.integer), x.shape
    if len(shape) != dims or not integral:
        raise ValueError(f"{name}: must be integers of {dims} dimensions, got {kind} of shape {tuple(shape)}")
    if isinstance(x, mx.array):
        return x
    if below is not None:
        wrong = ((x < 0) | (x >= below)) & (True if counted is None else counted)
        if wrong.any():
            raise ValueError(f"{name}: {x[wrong][0]} is not one of the model's {below} tokens")
    return mx.array(x)


def _int64(values: Any) -> mx.array:
    return mx.array(np.asarray(values, np.int64))


def _lengths(lengths: Any, b: int, t: int) -> list[int]:
    """Real tokens of each row, on the host."""
    if lengths is None:
        return [t] * b
    counts: Sequence[int] = np.asarray(lengths).tolist()
    if not isinstance(counts, list) or len(counts) != b or any(not 0 <= n <= t for n in counts):
        raise ValueError(f"lengths: must be {b} integers between 0 and {t}, got {counts}")
    return counts


def _check_rows(state: State, b: int) -> None:
    if state.position.shape != (b,):
        raise ValueError(f"state: is of {state.position.shape[0]} sequences, tokens have {b} rows")


def _last(out: mx.array, lengths: list[int], before: mx.array) -> mx.array:
    """Each row's last real column of out (b, t, d), that of `before` (b, d) where it has none."""
    column, here = mx.array(lengths)[:, None, None] - 1, mx.array(lengths)[:, None] > 0
    return mx.where(here, mx.take_along_axis(out, mx.maximum(column, 0), axis=1)[:, 0], before)


def _masked(x: mx.array, real: mx.array | None) -> mx.array:
    """x (b, t, ...) with zeros at padding."""
    return x if real is None else mx.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, mx.array(0, x.dtype))
