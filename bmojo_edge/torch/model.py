"""The model in PyTorch: embedding, layers, head, and the ways to move its state.

`forward` is differentiable and takes packed documents; `prefill` and `decode_one_token` are for inference. A state is
a value: no call changes the one it is given. Nothing here knows files or tokenizers beyond holding one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmojo_edge.config import Config
from bmojo_edge.engine import as_engine
from bmojo_edge.state import State, attending, map_leaves, state_spec
from bmojo_edge.storage_blocks import Shape
from bmojo_edge.tokenizer import Tokenizer
from bmojo_edge.torch.block import Block
from bmojo_edge.torch.layers import RMSNorm
from bmojo_edge.torch.layout import (
    Layout,
    Segments,
    fresh_state,
    growth_of,
    is_aligned,
    layout_of,
    segments_of,
    step_of,
)
from bmojo_edge.torch.mixers import Remembered
from bmojo_edge.torch.ops import why_plain, wide
from bmojo_edge.torch.recalled import packed_window, scores_of_blocks, shared, unpacked_blocks, window_tokens

PREFILL_BLOCK = 512  # tokens of a prompt that are computed at one time


class Memory(NamedTuple):
    """What the eidetic memory did in a call, chunks counted as `reference.Memory` counts them."""

    scores: Tensor  # (b, n_layers, t), 0 at padding and in layers without eidetic memory
    eidetic_index: Tensor  # (b, n_layers, n_chunks, e) int64 positions within the document, ascending, -1 = empty


class _Run(NamedTuple):
    """All that a run through the layers yields; rows are in the layout's order."""

    out: Tensor  # (b, t, d) what the head reads, 0 at padding
    state: State
    remembered: list[Remembered | None]  # a layer
    layout: Layout
    segments: Segments | None


def dtype_of(config: Config) -> torch.dtype:
    """The torch dtype a config names."""
    return getattr(torch, config.dtype)


class Model(nn.Module):
    """A language model of `bmojo`, `attention` and state-space layers; parameters as docs/checkpoints.md names them.

    Parameters are in `config.dtype`, but those of the scan (A_log, D, dt_bias, dt_proj.bias), which are float32.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        dtype = dtype_of(config)
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.embed = nn.Embedding(config.vocab_size, config.d_model, dtype=dtype)
        self.layers = nn.ModuleList(Block(config, i, dtype) for i in range(len(config.layer_types)))
        self.norm = RMSNorm(config.d_model, config.norm_eps, dtype)
        tied = config.tie_embeddings
        self.lm_head = None if tied else nn.Linear(config.d_model, config.vocab_size, bias=False, dtype=dtype)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The initialisation of Mamba's code (state-spaces/mamba), which the paper trains with, for every layer.

        Linear weights keep PyTorch's default, uniform within 1 / sqrt(fan in); biases are 0 but dt's; embeddings are
        normal with deviation 0.02; projections into the residual stream are divided by the square root of their
        number, as in GPT-2. dt_proj, A_log and D are drawn where they are made, see mixers/mamba.py.
        """
        nn.init.normal_(self.embed.weight, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and module.bias is not None and not name.endswith("dt_proj"):
                nn.init.zeros_(module.bias)
        into_residual = [weight for block in self.blocks() for weight in block.residual_weights()]
        for weight in into_residual:
            weight /= math.sqrt(len(into_residual))

    def blocks(self) -> list[Block]:
        """The layers."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        """Moving or casting the model keeps `config.dtype` the actual one (float64, for tests, has no name there)."""
        super()._apply(fn, recurse)
        name = str(self.embed.weight.dtype).removeprefix("torch.")
        if name != self.config.dtype and name in ("float32", "float16", "bfloat16"):
            self.config = self.config.replace(dtype=name)
        return self

    # --- states -------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embed.weight.device

    def init_state(self, batch: int = 1, offset: int = 0) -> State:
        """A fresh state of `batch` sequences, whose rotary positions begin at `offset`."""
        state = fresh_state(state_spec(self.config), batch, self.embed.weight.dtype, self.embed.weight)
        return state._replace(offset=torch.full_like(state.offset, offset))

    def reset(self, state: State, rows: Any) -> State:
        """A state whose `rows` (b,), bool, start anew at their offset; the others go on."""
        chosen = torch.as_tensor(rows, device=self.device)
        fresh = self.init_state(chosen.shape[0])

        def restarted(old: Tensor, new: Tensor) -> Tensor:
            if new.shape != old.shape:  # a cache that has grown
                new = torch.zeros_like(old)
            return torch.where(chosen.view(-1, *(1,) * (old.dim() - 1)), new, old)

        return map_leaves(restarted, state, fresh)._replace(offset=state.offset)

    # --- many tokens --------------------------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Any,
        state: State | None = None,
        segment_ids: Any = None,
        lengths: Any = None,
        eidetic_index: Any = None,
    ) -> tuple[Tensor, State]:
        """Logits (b, t, v) of tokens (b, t) after `state`, and the state after them; state None is a fresh one.

        segment_ids (b, t): a change starts a document, -1 is padding, a row's first document continues `state`;
        lengths (b,): right padding; eidetic_index (b, n_layers, n_chunks, e) forces the eidetic sets. Logits of
        padding are 0. Gradients flow into a carried state that has not been detached.
        """
        out, state = self.hidden(tokens, state, segment_ids, lengths, eidetic_index)
        return self.head(out), state

    def hidden(
        self,
        tokens: Any,
        state: State | None = None,
        segment_ids: Any = None,
        lengths: Any = None,
        eidetic_index: Any = None,
    ) -> tuple[Tensor, State]:
        """`forward` without the head: normalised activations (b, t, d) in place of logits."""
        run = self._run(tokens, state, segment_ids, lengths, eidetic_index)
        return _in_columns(run.out, run.segments), run.state

    def forward_with_memory(
        self,
        tokens: Any,
        state: State | None = None,
        segment_ids: Any = None,
        lengths: Any = None,
        eidetic_index: Any = None,
    ) -> tuple[Tensor, State, Memory]:
        """`forward`, with innovations and eidetic sets as they were used."""
        run = self._run(tokens, state, segment_ids, lengths, eidetic_index)
        return self.head(_in_columns(run.out, run.segments)), run.state, self._memory(run)

    def activations(self, tokens: Any, segment_ids: Any = None, lengths: Any = None) -> Tensor:
        """`hidden` (b, t, d) of sequences that begin here and leave no state: what training differentiates.

        Nothing waits for the GPU where documents begin at multiples of `chunk` and segment_ids are on the CPU.
        """
        tokens = self._integers(tokens, "tokens", 2)
        tokens, layout, segments = self._placed(tokens, None, segment_ids, lengths)
        h, config = self._embedded(tokens, layout), self.config
        if h.is_cuda and "bmojo" in config.layer_types and (config.n_eidetic or config.n_sinks):
            reason = why_plain(config.d_head, h.dtype, config.chunk_size, layout.aligned)
            if reason is not None:
                warnings.warn(f"{reason}; plain PyTorch computes attention, slowly", RuntimeWarning, stacklevel=2)
        for block in self.blocks():
            h = block(h, None, layout).out
        return _in_columns(self._normalised(h, layout), segments)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., v) of normalised activations (..., d)."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """(v, d): what turns normalised activations into logits."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def _run(
        self,
        tokens: Any,
        state: State | None,
        segment_ids: Any,
        lengths: Any,
        eidetic_index: Any,
        watch: list[dict[str, Tensor]] | None = None,
    ) -> _Run:
        tokens = self._integers(tokens, "tokens", 2)
        tokens, layout, segments = self._placed(tokens, state, segment_ids, lengths)
        state = self.init_state(tokens.shape[0]) if state is None else state
        growth = growth_of(self.config, layout.last_position, layout.last_column < 0)
        recalled = shared(self.config, state, layout.chunks)
        layout = layout._replace(tokens=growth[0], idle=growth[1], recalled=recalled, watch=watch)
        forced = self._forced(eidetic_index, layout)
        h, states, remembered = self._embedded(tokens, layout), [], []
        for i, block in enumerate(self.blocks()):
            result = block(h, state.layers[i], layout, None if forced is None else forced[:, i])
            h = result.out
            states.append(result.state)
            remembered.append(result.remembered)
        out = self._normalised(h, layout)
        return _Run(out, State(tuple(states), layout.last_position + 1, state.offset), remembered, layout, segments)

    def _placed(
        self, tokens: Tensor, state: State | None, segment_ids: Any, lengths: Any
    ) -> tuple[Tensor, Layout, Segments | None]:
        """tokens (b, t) in the layout's order, their layout, and their documents."""
        b, t = tokens.shape
        lengths = None if lengths is None else self._integers(lengths, "lengths", 1, (b,))
        if state is not None and state.position.shape != (b,):
            raise ValueError(f"state: is of {state.position.shape[0]} sequences, tokens have {b} rows")
        segments, labels = None, segment_ids
        if segment_ids is not None:
            labels = segment_ids.cpu() if isinstance(segment_ids, Tensor) else torch.as_tensor(segment_ids)
            segments = segments_of(self._integers(segment_ids, "segment_ids", 2, (b, t)), lengths)
            tokens = tokens.gather(1, segments.order)
        nothing = torch.zeros(b, dtype=torch.int64, device=self.device)
        start, offset = (nothing, nothing) if state is None else state[1:]
        aligned = is_aligned(self.config, None if state is None else start, labels, lengths)
        at = (start, offset, segments, lengths, wide(self.embed.weight.dtype), state is None, aligned)
        return tokens, layout_of(self.config, (b, t), *at), segments

    def _embedded(self, tokens: Tensor, layout: Layout) -> Tensor:
        return _masked(self.embed(_masked(tokens, layout.real)), layout.real)

    def _normalised(self, h: Tensor, layout: Layout) -> Tensor:
        return _masked(self.norm(h).to(h.dtype), layout.real)

    def _memory(self, run: _Run) -> Memory:
        """One array of all layers; those without eidetic memory have zeros and empty sets."""
        layout, kind, e = run.layout, wide(self.embed.weight.dtype), self.config.n_eidetic
        last = layout.chunk.gather(1, layout.last_column.clamp(min=0)[:, None])[:, 0] + 1
        c = int(last.masked_fill(layout.last_column < 0, 0).max())
        no_scores = torch.zeros(layout.position.shape, dtype=kind, device=self.device)
        no_sets = torch.full((len(no_scores), c, e), -1, dtype=torch.int64, device=self.device)
        scores = [no_scores if r is None else _masked(r.scores, layout.real) for r in run.remembered]
        sets = [no_sets if r is None else r.sets[:, :c] for r in run.remembered]
        return Memory(_in_columns(torch.stack(scores, dim=2), run.segments).transpose(1, 2), torch.stack(sets, dim=1))

    def _forced(self, eidetic_index: Any, layout: Layout) -> Tensor | None:
        """Forced sets with as many chunks as the layout counts."""
        if eidetic_index is None or layout.chunks is None or not self.config.n_eidetic:
            return None
        index = self._integers(eidetic_index, "eidetic_index", 4)
        (b, c), n_layers, e = layout.chunks.limit.shape, len(self.layers), self.config.n_eidetic
        if index.shape[:2] != (b, n_layers) or index.shape[3] != e:
            raise ValueError(f"eidetic_index: must have shape ({b}, {n_layers}, chunks, {e}), got {tuple(index.shape)}")
        return F.pad(index, (0, 0, 0, c - index.shape[2]), value=-1)

    def _integers(self, x: Any, name: str, dims: int, shape: tuple[int, ...] | None = None) -> Tensor:
        x = torch.as_tensor(x)
        if x.is_floating_point() or x.dim() != dims or (shape is not None and tuple(x.shape) != shape):
            wanted = f"shape {shape}" if shape else f"{dims} dimensions"
            raise ValueError(f"{name}: must be integers of {wanted}, got {x.dtype} of shape {tuple(x.shape)}")
        if self.device.type == "cuda" and x.device.type == "cpu":
            return x.long().pin_memory().to(self.device, non_blocking=True)  # does not wait for the GPU's other work
        return x.to(self.device, torch.int64)

    # --- inference ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, tokens: Any, state: State, lengths: Any = None) -> tuple[Tensor, State]:
        """Logits (b, v) of each row's last real token of a prompt (b, t), and the state; 0 in rows of length 0.

        Works in blocks: memory does not grow with t, but for the caches of full-attention layers.
        """
        tokens = self._integers(tokens, "tokens", 2)
        b, t = tokens.shape
        lengths = None if lengths is None else self._integers(lengths, "lengths", 1, (b,))
        last = self.embed.weight.new_zeros(b, self.config.d_model)
        for begin in range(0, t, PREFILL_BLOCK):
            block = tokens[:, begin : begin + PREFILL_BLOCK]
            if lengths is None:
                out, state = self.hidden(block, state)
                last = out[:, -1]
            else:
                left = (lengths - begin).clamp(0, block.shape[1])
                out, state = self.hidden(block, state, lengths=left)
                ends = (left - 1).clamp(min=0)[:, None, None].expand(b, 1, last.shape[1])
                last = torch.where((left > 0)[:, None], out.gather(1, ends)[:, 0], last)
        return self.head(last), state

    @torch.no_grad()
    def prefill_with_attention(self, tokens: Any, state: State) -> tuple[Tensor, State, list[dict[str, Tensor]]]:
        """`prefill` in one block, with the share of each token's attention that each memory got in each layer.

        A layer's shares are (b, h, t) by the names of `state.MEMORIES`, together 1; layers without attention have none.
        """
        watch: list[dict[str, Tensor]] = []
        run = self._run(tokens, state, None, None, None, watch)
        found = iter(watch)
        return self.head(run.out[:, -1]), run.state, [next(found) if a else {} for a in attending(self.config)]

    @torch.no_grad()
    def window_tokens(self, state: State, begin: int, count: int, layers: Sequence[int]) -> np.ndarray:
        """Keys, unrotated, and values of the tokens at positions begin .. begin + count - 1 of every row.

        The window of each of the `layers` must still hold them. (layers, 2, b, g, count, p) in NumPy: float16 where the
        model is in half precision, else float32.
        """
        position = torch.arange(begin, begin + count, device=self.device).expand(len(state.position), -1)
        found = [window_tokens(self.config, state.layers[i].window, position, state.offset) for i in layers]
        tokens = torch.stack([torch.stack(pair) for pair in found])
        return tokens.to(torch.float32 if tokens.element_size() > 2 else torch.float16).cpu().numpy()

    @torch.no_grad()
    def window_blocks(self, state: State, begin: int, count: int, shape: Shape) -> Tensor:
        """The blocks of tokens begin .. begin + count - 1 of every row, as `storage_blocks.packed` has them, as bytes.

        Rows stand at one position, and the window of each of the shape's layers must still hold the tokens.
        """
        windows = [state.layers[i].window for i in shape.layers]
        router = state.layers[shape.router].window
        return packed_window(self.config, windows, router, begin, count, state.offset, shape)

    @torch.no_grad()
    def recalled_blocks(self, payloads: np.ndarray, shape: Shape) -> list[Tensor]:
        """Keys, values (b, g, n * block, p), of each layer, of blocks (b, n, payload_bytes) that were read back."""
        return unpacked_blocks(as_engine(payloads, self.embed.weight), shape, self.embed.weight.dtype)

    def block_scorer(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
        """What scores blocks on the model's GPU, beside its other work and for any thread; None: NumPy does."""
        if self.device.type != "cuda":
            return None
        beside = torch.cuda.Stream(self.device)

        @torch.no_grad()
        def scores(queries: np.ndarray, summaries: np.ndarray) -> np.ndarray:
            with torch.cuda.stream(beside):
                given = (as_engine(x, self.embed.weight) for x in (queries, summaries))
                return scores_of_blocks(*given).cpu().numpy()

        return scores

    @torch.no_grad()
    def decode_one_token(self, token: Any, state: State, active: Any = None) -> tuple[Tensor, State]:
        """Logits (b, v) after one token (b,) of each row, and the state.

        Rows with `active` (b,) False keep their state; their logits are 0.
        """
        token = self._integers(token, "token", 1, tuple(state.position.shape))
        active = None if active is None else torch.as_tensor(active, device=self.device).bool()
        step = step_of(self.config, state.position, state.offset, active, wide(self.embed.weight.dtype))
        h, states = self.embed(token if active is None else token.masked_fill(~active, 0)), []
        for block, layer_state in zip(self.blocks(), state.layers, strict=True):
            h, layer_state = block.step(h, layer_state, step)
            states.append(layer_state)
        out = self.norm(h).to(h.dtype)
        out = out if active is None else out.masked_fill(~active[:, None], 0)
        moved = 1 if active is None else active.long()
        return self.head(out), State(tuple(states), state.position + moved, state.offset)


def _masked(x: Tensor, real: Tensor | None) -> Tensor:
    """x (b, t, ...) with zeros at padding."""
    return x if real is None else x.masked_fill(~real.view(*real.shape, *(1,) * (x.dim() - 2)), 0)


def _in_columns(x: Tensor, segments: Segments | None) -> Tensor:
    """x (b, t, n) in the columns its tokens were given in."""
    return x if segments is None else x.gather(1, segments.order.argsort(dim=1)[..., None].expand_as(x))
