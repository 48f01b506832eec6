"""A model with a store beside it: what leaves its window is kept, and what a text asks for is read back.

`WithStorage` has the face of `engine.LM`, so sessions and generation run on it as on the model. When blocks are
chosen and which can be seen depends on the tokens and the store's content alone (docs/storage.md): not on how a
prompt is split, nor on the background writer. It knows states and NumPy, not engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from bmojo_edge.config import Config
from bmojo_edge.engine import LM, as_engine
from bmojo_edge.rope import softmax_scale, turns_per_token
from bmojo_edge.state import ELSEWHERE, RecalledState, State
from bmojo_edge.storage import Shape, Store, StoreError
from bmojo_edge.tensors import as_numpy

__all__ = ["RecallState", "StorableLM", "WithStorage", "shape_for"]

BLOCK, POOL = 32, 2
TOP_K, EVERY, QUERIES = 8, 512, 16


class StorableLM(LM, Protocol):
    """A model whose window can be read: both twins."""

    def window_tokens(self, state: Any, begin: int, count: int, layers: Sequence[int]) -> np.ndarray: ...


class RecallState(NamedTuple):
    """A model's state with what it recalls (in its layers), and where it stands in the store; the rest is NumPy."""

    layers: tuple[Any, ...]
    position: Any  # (b,) int64
    offset: Any  # (b,) int64
    left: np.ndarray  # (b,) int64: tokens until blocks are chosen anew
    branch: np.ndarray  # (b,) int64: the source its blocks go to, 0 before there is one
    horizon: np.ndarray  # (b,) int64: blocks numbered below are seen, whosever they are
    recent: np.ndarray  # (b, block) int64: the last ids

    @property
    def inner(self) -> State:
        """The model's own state."""
        return State(self.layers, self.position, self.offset)


def shape_for(config: Config, block: int = BLOCK, pool: int = POOL) -> Shape:
    """What a store for this model keeps: all its bmojo layers, chosen by the one nearest to 0.6 of its depth.

    Raises StoreError where the model has no such layer, or a window shorter than two blocks.
    """
    able = [i for i, kind in enumerate(config.layer_types) if kind == "bmojo"]
    if not able:
        raise StoreError("storage needs layers of type bmojo, which have a window; convert the model with --window N")
    if config.window < 2 * block:
        raise StoreError(f"storage needs a window of two blocks, {2 * block} tokens; the model's is {config.window}")
    depth = len(config.layer_types)
    router = min(able, key=lambda i: abs(i - round(0.6 * depth)))
    return Shape(block, tuple(able), router, pool, config.kv_heads, config.d_head)


class WithStorage:
    """A model that keeps and recalls through a store; states are `RecallState`, rows of a batch stand at one position.

    top_k: blocks that are recalled; every: tokens after which they are chosen anew; queries: the last tokens whose
    queries choose; name: of the conversation in the store; keeps: whether what leaves the window is stored.
    """

    def __init__(
        self, lm: StorableLM, store: Store, top_k: int = TOP_K, every: int = EVERY, queries: int = QUERIES,
        name: str = "conversation", keeps: bool = True,
    ) -> None:  # fmt: skip
        for option, value in (("top_k", top_k), ("every", every), ("queries", queries)):
            if value < 1:
                raise ValueError(f"{option}: must be at least 1, got {value}")
        _check_fits(store, lm.config)
        self.lm, self.store, self.top_k, self.every, self.queries = lm, store, top_k, every, queries
        self.name, self.keeps = name, keeps
        self._kept = list(dict.fromkeys((*store.shape.layers, store.shape.router)))
        self._limit = lm.config.window - store.shape.block + 1  # tokens of one call, so that whole blocks stay in reach

    # --- the face of a model

    @property
    def config(self) -> Config:
        """The model's configuration."""
        return self.lm.config

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.lm.tokenizer

    def __getattr__(self, name: str) -> Any:
        if name in ("parameters", "named_parameters"):  # by which models are told apart
            return getattr(self.lm, name)
        raise AttributeError(name)

    def init_state(self, batch: int = 1, offset: int = 0) -> RecallState:
        """A fresh state; it will see what the store holds now, and what it stores itself."""
        state, c, s = self.lm.init_state(batch, offset), self.config, self.store.shape
        layers, n = list(state.layers), self.top_k * s.block
        like = layers[s.router].window.k
        for i in s.layers:
            slots = np.zeros((batch, s.kv_heads, n, s.head_dim), _dtype(c))
            positions = np.full((batch, n), -1, np.int64)
            recalled = RecalledState(*(as_engine(x, like) for x in (slots, slots, positions)))
            layers[i] = layers[i]._replace(recalled=recalled)
        last = np.zeros((batch, self.queries, c.n_heads * c.d_head), np.float32)
        layers[s.router] = layers[s.router]._replace(queries=as_engine(last, like))
        rows = np.zeros(batch, np.int64)
        return RecallState(
            tuple(layers), state.position, state.offset, rows + self.every, rows, rows + self.store.next_id,
            np.zeros((batch, s.block), np.int64),
        )  # fmt: skip

    def forward(self, tokens: Any, state: RecallState) -> tuple[Any, RecallState]:
        """Logits (b, t, v), in a list of parts along t, and the state, as the model's own `forward`."""
        return self._advance(tokens, state, self.lm.forward)  # pyright: ignore[reportAttributeAccessIssue]

    def prefill(self, tokens: Any, state: RecallState, lengths: Any = None) -> tuple[Any, RecallState]:
        """Logits (b, v) of each row's last token, and the state. Rows must be of one length."""
        tokens = np.asarray(tokens)
        if lengths is not None and (np.asarray(lengths) != tokens.shape[1]).any():
            raise ValueError("lengths: rows of a model with storage must be of one length")
        parts, state = self._advance(tokens, state, self.lm.prefill)
        return parts[-1], state

    def decode_one_token(self, token: Any, state: RecallState, active: Any = None) -> tuple[Any, RecallState]:
        """Logits (b, v) after one token (b,) of each row, and the state."""
        if active is not None and not np.asarray(active).all():
            raise ValueError("active: all rows of a model with storage move together")
        state = self.choose(state) if state.left[0] == 0 else state
        ids = as_numpy(token).reshape(-1, 1)
        logits, inner = self.lm.decode_one_token(token, state.inner)
        return logits, self._moved(state, inner, ids)

    def decode_with_attention(self, token: Any, state: RecallState) -> tuple[Any, RecallState, list[dict[str, Any]]]:
        """`decode_one_token`, and how each layer's attention divided among its memories, "storage" among them."""
        state = self.choose(state) if state.left[0] == 0 else state
        watched: Any = self.lm
        logits, inner, shares = watched.decode_with_attention(token, state.inner)
        return logits, self._moved(state, inner, as_numpy(token).reshape(-1, 1)), shares

    def prefill_prompt(self, tokens: Any, state: RecallState) -> tuple[Any, RecallState]:
        """`prefill` of a prompt that is to be answered: its end is read with what it asks for."""
        tokens = np.asarray(tokens)
        head, tail = tokens[:, : -self.queries], tokens[:, -self.queries :]
        if head.shape[1]:
            _, state = self.prefill(head, state)
        return self.prefill(tail, self.recall(tail, state))

    # --- choosing

    def recall(self, tokens: Any, state: RecallState) -> RecallState:
        """The state with the blocks that tokens (b, t) look for, in place of those it recalls; they are not taken in.

        Blocks are chosen anew `every` tokens from here.
        """
        _, probe = self.lm.prefill(np.asarray(tokens), state.inner)
        return self.choose(state, self._queries(probe, min(np.shape(tokens)[1], self.queries)))

    def choose(self, state: RecallState, queries: np.ndarray | None = None) -> RecallState:
        """The state with the blocks that queries (b, h, n, p), scaled, attend to most; None: the last of its own."""
        s, position = self.store.shape, _position(state)
        if queries is None:
            queries = self._queries(state.inner, min(position, self.queries))
        n, b, limit = self.top_k * s.block, len(queries), position - self.config.window

        def chosen_for(row: int) -> np.ndarray:
            slots = self.store.visible(int(state.horizon[row]), int(state.branch[row]), limit)
            return np.sort(self.store.choose(queries[row], slots, self.top_k))

        with ThreadPoolExecutor(min(b, 8)) as pool:
            chosen = list(pool.map(chosen_for, range(b)))
        kv = np.zeros((len(s.layers), 2, b, s.kv_heads, n, s.head_dim), np.float16)
        positions = np.full((b, n), -1, np.int64)
        for row, slots in enumerate(chosen):
            if len(slots):
                count = len(slots) * s.block
                kv[:, :, row, :, :count] = self.store.read(slots)
                positions[row, :count] = self._positions(slots, state, row)
        layers, like = list(state.layers), state.layers[s.router].window.k
        held, kv = as_engine(positions, like), kv.astype(_dtype(self.config), copy=False)
        for i, (k, v) in zip(s.layers, kv, strict=True):
            layers[i] = layers[i]._replace(recalled=RecalledState(as_engine(k, like), as_engine(v, like), held))
        return state._replace(layers=tuple(layers), left=np.full_like(state.left, self.every))

    def _queries(self, state: State, count: int) -> np.ndarray:
        """The router's last `count` queries (b, h, count, p) as they meet unrotated keys, scaled."""
        c = self.config
        last = as_numpy(state.layers[self.store.shape.router].queries).astype(np.float32)[:, -count:]
        last = last.reshape(len(last), count, c.n_heads, c.d_head).transpose(0, 2, 1, 3)
        return _rotated(last, turns_per_token(c), c.window) * np.float32(softmax_scale(c))

    def _positions(self, slots: np.ndarray, state: RecallState, row: int) -> np.ndarray:
        """Where the tokens of slots stand for this sequence, (n * block,), see RecalledState."""
        own = np.isin(self.store.branches(slots), self.store.lineage(int(state.branch[row])))
        at = self.store.positions(slots)
        seen = at >= self.config.n_sinks  # a text's first tokens draw attention whatever they say; ours are sinks
        return np.where(seen, np.where(own[:, None], at, ELSEWHERE), -1).reshape(-1)

    # --- moving and keeping

    def _advance(
        self, tokens: Any, state: RecallState, move: Callable[[Any, Any], tuple[Any, Any]]
    ) -> tuple[list[Any], RecallState]:
        """Tokens (b, t) in calls between which blocks are chosen; what `move` returns of each, and the state."""
        tokens, parts, begin = np.asarray(tokens), [], 0
        while begin < tokens.shape[1]:
            if state.left[0] == 0:
                state = self.choose(state)
            ids = tokens[:, begin : begin + min(int(state.left[0]), self._limit)]
            out, inner = move(ids, state.inner)
            parts.append(out)
            state, begin = self._moved(state, inner, ids), begin + ids.shape[1]
        return parts, state

    def _moved(self, state: RecallState, inner: State, ids: np.ndarray) -> RecallState:
        """The state after ids (b, t), whose whole blocks are stored."""
        block, n = self.store.shape.block, ids.shape[1]
        known = np.concatenate([state.recent, ids], axis=1)
        state = state._replace(
            layers=inner.layers, position=inner.position, left=state.left - n, recent=known[:, -block:]
        )
        if not self.keeps:
            return state
        end = _position(state)
        begin, whole = (end - n) // block * block, end // block * block
        if begin == whole:
            return state
        kept = known[:, begin - end :][:, : whole - begin]
        kv = _without_sinks(self.lm.window_tokens(inner, begin, whole - begin, self._kept), begin, self.config.n_sinks)
        branch = [self._branch(int(number), begin) for number in state.branch]
        for row, number in enumerate(branch):
            self.store.add(number, begin, kept[row], kv[:, :, row])
        return state._replace(branch=np.array(branch, np.int64))

    def _branch(self, branch: int, at: int) -> int:
        """The branch on which a state goes on from position `at`: a new one where another state has gone on."""
        if branch and self.store.tip(branch) == at:
            return branch
        return self.store.begin(self.name, "session", branch, at)

    # --- texts

    def add_text(self, ids: Sequence[int], name: str, progress: Callable[[int, int], None] | None = None) -> int:
        """Store a text of the given tokens, which the model reads from its beginning; its branch in the store."""
        s, text = self.store.shape, np.asarray(ids, np.int64)
        branch, state = self.store.begin(name, "file"), self.lm.init_state()
        size = self._limit // s.block * s.block
        for begin in range(0, len(text), size):
            part = text[begin : begin + size]
            _, state = self.lm.prefill(part[None].astype(np.int32), state)
            kv = _without_sinks(self.lm.window_tokens(state, begin, len(part), self._kept), begin, self.config.n_sinks)
            missing = -len(part) % s.block  # the last block is filled with its last token, which nobody sees there
            kv = np.pad(kv[:, :, 0], [(0, 0)] * 3 + [(0, missing), (0, 0)], mode="edge")
            self.store.add(branch, begin, np.pad(part, (0, missing)), kv, tokens=len(part))
            if progress is not None:
                progress(begin + len(part), len(text))
        self.store.complete(branch)
        return branch

    def search(self, ids: Sequence[int], count: int) -> np.ndarray:
        """Slots of the blocks that a text, put to a fresh model, looks for; best first."""
        inner = self.init_state().inner
        _, probe = self.lm.prefill(np.asarray([ids], np.int32), inner)
        queries = self._queries(probe, min(len(ids), self.queries))[0]
        return self.store.choose(queries, self.store.visible(self.store.next_id, 0, 0), count)


def _check_fits(store: Store, config: Config) -> None:
    """Raise StoreError unless the store's sizes are ones of this model."""
    shape, want = store.shape, shape_for(config, store.shape.block, store.shape.pool)
    able = {i for i, kind in enumerate(config.layer_types) if kind == "bmojo"}
    if not able.issuperset((*shape.layers, shape.router)) or shape[3:] != want[3:]:
        raise StoreError(f"{store.folder}: keeps {shape}, which this model has not; make a new store")


def _position(state: Any) -> int:
    positions = as_numpy(state.position)
    if (positions != positions[0]).any():
        raise ValueError("state: all rows of a model with storage must stand at one position")
    return int(positions[0])


def _dtype(config: Config) -> np.dtype[Any]:
    import ml_dtypes  # noqa: F401 - gives NumPy bfloat16

    return np.dtype(config.dtype)


def _without_sinks(kv: np.ndarray, begin: int, sinks: int) -> np.ndarray:
    """Keys and values (..., n, p) from position `begin` on, the first tokens of a text replaced by the next.

    They are never read from storage, and their keys would make the summary of their block look like everything.
    """
    n = min(max(sinks - begin, 0), kv.shape[-2] - 1)
    if n:
        kv = kv.copy()
        kv[..., :n, :] = kv[..., n : n + 1, :]
    return kv


def _rotated(x: np.ndarray, turns: np.ndarray | None, position: int) -> np.ndarray:
    """x (..., p) rotated to one position."""
    if turns is None:
        return x
    with np.errstate(over="ignore"):
        phase = (np.uint64(position) * turns).astype(np.int64)
    angle = phase.astype(np.float64) * (2 * np.pi / 2.0**64)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
