"""A model with a store beside it: what leaves its window is kept, and what a text asks for is read back.

`WithStorage` has the face of `engine.LM`, so sessions and generation run on it as on the model. When blocks are
chosen and which can be seen depends on the tokens and the store's content alone (docs/storage.md): not on how a
prompt is split, nor on what runs in the background. It knows states and NumPy, not engines.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from typing import Any, NamedTuple, Protocol

import numpy as np

from bmojo_edge.config import Config
from bmojo_edge.engine import LM, as_engine, host_array, to_host
from bmojo_edge.rope import softmax_scale, turns_per_token
from bmojo_edge.state import ELSEWHERE, RecalledState, State
from bmojo_edge.storage import Shape, Store, StoreError
from bmojo_edge.tensors import as_numpy

__all__ = ["RecallState", "StorableLM", "WithStorage", "shape_for"]

BLOCK, POOL = 32, 2
TOP_K, EVERY, QUERIES = 8, 512, 16
CHOOSERS = 8  # rows that are chosen for at one time
BEGUN = 4  # choices that are kept until their blocks join; older ones are made anew


class StorableLM(LM, Protocol):
    """A model whose window can be stored and read back: both twins."""

    def window_blocks(self, state: Any, begin: int, count: int, shape: Shape) -> Any: ...

    def recalled_blocks(self, payloads: np.ndarray, shape: Shape) -> Sequence[Any]: ...

    def block_scorer(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None: ...


class _Choice(NamedTuple):
    """Blocks that are being chosen and read for the rows of a batch."""

    payloads: np.ndarray  # (b, top_k, payload_bytes) uint8
    positions: np.ndarray  # (b, top_k * block) int64, see RecalledState
    rows: list[Future[None]]  # done when theirs are filled in


class RecallState(NamedTuple):
    """A model's state with what it recalls (in its layers), and where it stands in the store; the rest is NumPy."""

    layers: tuple[Any, ...]
    position: Any  # (b,) int64
    offset: Any  # (b,) int64
    left: np.ndarray  # (b,) int64: tokens until blocks are chosen anew
    at: np.ndarray  # (b,) int64: position
    branch: np.ndarray  # (b,) int64: the source its blocks go to, 0 before there is one
    horizon: np.ndarray  # (b,) int64: blocks numbered below are seen, whosever they are
    recent: np.ndarray  # (b, block) int64: the last ids
    asked: Any  # (b, n, h p): the queries for which blocks are being chosen, to join when `left` is 0
    seen: np.ndarray  # (b,) int64: the number of the store's next block when they were taken, 0 = none were

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

    top_k: blocks that are recalled; every: tokens from one choice to the next, whose blocks join after as many again; a
    prompt is read in calls of so many at most, so less than the model's chunk is slow; queries: the last tokens whose
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
        self._scores = lm.block_scorer()
        self._pool = ThreadPoolExecutor(CHOOSERS, thread_name_prefix="recall")
        # By the identity of the queries, which are held so that it stays theirs, and by `seen`.
        self._begun: OrderedDict[tuple[int, int], tuple[Any, _Choice]] = OrderedDict()
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
        return self.around(self.lm.init_state(batch, offset))

    def around(self, state: State, ids: Sequence[int] = ()) -> RecallState:
        """A state of the model alone as one that goes on with this store; ids: the last it has read, of every row."""
        c, s, position = self.config, self.store.shape, as_numpy(state.position)
        layers, n, batch = list(state.layers), self.top_k * s.block, len(position)
        like = layers[s.router].window.k
        for i in s.layers:
            slots = np.zeros((batch, s.kv_heads, n, s.head_dim), _dtype(c))
            positions = np.full((batch, n), -1, np.int64)
            recalled = RecalledState(*(as_engine(x, like) for x in (slots, slots, positions)))
            layers[i] = layers[i]._replace(recalled=recalled)
        last = np.zeros((batch, self.queries, c.n_heads * c.d_head), np.float32)
        queries = as_engine(last, like)
        layers[s.router] = layers[s.router]._replace(queries=queries)
        rows, recent = np.zeros(batch, np.int64), np.zeros((batch, s.block), np.int64)
        if ids:
            recent[:, -min(len(ids), s.block) :] = ids[-s.block :]
        return RecallState(
            tuple(layers), state.position, state.offset, rows + self.every, rows + position, rows,
            rows + self.store.next_id, recent, queries, rows,
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
        state = self._turned(state) if state.left[0] == 0 else state
        ids = as_numpy(token).reshape(-1, 1)
        logits, inner = self.lm.decode_one_token(token, state.inner)
        return logits, self._moved(state, inner, ids)

    def prefill_with_attention(
        self, tokens: Any, state: RecallState
    ) -> tuple[Any, RecallState, list[dict[str, np.ndarray]]]:
        """`prefill`, and how each layer's attention divided among its memories, "storage" among them."""
        watched: Any = self.lm
        told: list[list[dict[str, Any]]] = []

        def move(ids: Any, inner: State) -> tuple[Any, State]:
            logits, inner, shares = watched.prefill_with_attention(ids, inner)
            told.append(shares)
            return logits, inner

        parts, state = self._advance(tokens, state, move)
        return parts[-1], state, [_joined_shares(layer) for layer in zip(*told, strict=True)]

    def prefill_prompt(self, tokens: Any, state: RecallState) -> tuple[Any, RecallState]:
        """`prefill` of a prompt that is to be answered: its end is read with what it asks for."""
        state, tail = self._asked_for(np.asarray(tokens), state)
        return self.prefill(tail, state)

    def _asked_for(self, tokens: np.ndarray, state: RecallState) -> tuple[RecallState, np.ndarray]:
        """The state after all but the end of a prompt (b, t), with what its end asks for; and that end."""
        head, tail = tokens[:, : -self.queries], tokens[:, -self.queries :]
        if head.shape[1]:
            _, state = self.prefill(head, state)
        return self.recall(tail, state), tail

    def before_answer(
        self, ids: Sequence[int], state: RecallState, now: RecallState
    ) -> tuple[WithStorage, RecallState]:
        """For looking back: the state as it was when all but the last of a prompt's ids had been read, after `state`.

        now: what the conversation has become, by which its own blocks are found. With a model that stores nothing.
        """
        model, state = copy(self), state._replace(branch=now.branch)
        model.keeps = False
        if len(ids) > 1:
            state, tail = model._asked_for(np.array([ids], np.int32), state)
            if tail.shape[1] > 1:
                _, state = model.prefill(tail[:, :-1], state)
        return model, state

    # --- choosing

    def recall(self, tokens: Any, state: RecallState) -> RecallState:
        """The state with the blocks that tokens (b, t) look for, in place of those it recalls; they are not taken in.

        From here `every` tokens are counted anew, after which blocks are asked for again.
        """
        _, probe = self.lm.prefill(np.asarray(tokens), state.inner)
        queries = probe.layers[self.store.shape.router].queries
        count = min(np.shape(tokens)[1], self.queries)
        choice = self._search(queries, count, int(state.at[0]), state, self.store.next_id)
        return self._joined(state, choice)._replace(left=np.full_like(state.left, self.every), seen=0 * state.seen)

    def _turned(self, state: RecallState) -> RecallState:
        """At the end of a stretch: the blocks asked for at the end of the one before join, and the next are asked for.

        So they are chosen and read in the background while the model takes in a stretch of tokens.
        """
        if state.seen[0]:
            begun = self._begun.get((id(state.asked), int(state.seen[0])))
            state = self._joined(state, begun[1] if begun else self._asked(state, int(state.at[0]) - self.every))
        left, seen = np.full_like(state.left, self.every), np.full_like(state.seen, self.store.next_id)
        state = state._replace(left=left, seen=seen, asked=state.layers[self.store.shape.router].queries)
        key = id(state.asked), self.store.next_id
        if key not in self._begun:  # else another went on from the same state
            self._begun[key] = (state.asked, self._asked(state, int(state.at[0])))
        while len(self._begun) > BEGUN:
            self._begun.popitem(last=False)
        return state

    def _asked(self, state: RecallState, position: int) -> _Choice:
        """The choice for the queries that a state has asked with at a position."""
        return self._search(state.asked, min(position, self.queries), position, state, int(state.seen[0]))

    def _search(self, queries: Any, count: int, position: int, state: RecallState, next_id: int) -> _Choice:
        """Begin to choose and read, for each row, the blocks that the last `count` queries attend to most.

        queries (b, n, h p); seen is what could be at `position`, when the next block had the number `next_id`.
        """
        s, store, limit, b = self.store.shape, self.store, position - self.config.window, len(state.at)
        fetch, like = to_host(queries), state.layers[self.store.shape.router].window.k
        choice = _Choice(
            host_array((b, self.top_k, s.payload_bytes), "uint8", like),
            host_array((b, self.top_k * s.block), "int64", like),
            [],
        )

        def fill(row: int, slots: np.ndarray) -> None:
            try:
                wanted = self._as_asked(fetch()[row, -count:])
                chosen = store.by_age(store.choose(wanted, slots, self.top_k, next_id, self._scores))
                store.read(chosen, choice.payloads[row])
                choice.payloads[row, len(chosen) :] = 0
                choice.positions[row] = -1
                choice.positions[row, : len(chosen) * s.block] = self._positions(chosen, state, row)
            finally:
                store.end_reading()

        for row in range(b):
            slots = store.visible(int(state.horizon[row]), int(state.branch[row]), limit)
            store.begin_reading()
            choice.rows.append(self._pool.submit(fill, row, slots))
        return choice

    def _joined(self, state: RecallState, choice: _Choice) -> RecallState:
        """The state that recalls what was chosen, in place of what it recalls."""
        for row in choice.rows:
            row.result()
        s, layers = self.store.shape, list(state.layers)
        held = as_engine(choice.positions, layers[s.router].window.k)
        kv = self.lm.recalled_blocks(choice.payloads, s)
        for i, k, v in zip(s.layers, kv[::2], kv[1::2], strict=True):
            layers[i] = layers[i]._replace(recalled=RecalledState(k, v, held))
        return state._replace(layers=tuple(layers))

    def _as_asked(self, queries: np.ndarray) -> np.ndarray:
        """Queries (n, h p) of the router as they meet unrotated keys, scaled: (h, n, p)."""
        c = self.config
        heads = queries.astype(np.float32).reshape(len(queries), c.n_heads, c.d_head).transpose(1, 0, 2)
        return _rotated(heads, turns_per_token(c), c.window) * np.float32(softmax_scale(c))

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
                state = self._turned(state)
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
            layers=inner.layers, position=inner.position, left=state.left - n, at=state.at + n, recent=known[:, -block:]
        )
        if not self.keeps:
            return state
        end = int(state.at[0])
        begin, whole = (end - n) // block * block, end // block * block
        if begin == whole:
            return state
        kept = known[:, begin - end :][:, : whole - begin]
        fetch = to_host(self.lm.window_blocks(inner, begin, whole - begin, self.store.shape))
        branches = [self._branch(int(number), begin) for number in state.branch]
        self.store.add_packed(branches, begin, kept, fetch)
        return state._replace(branch=np.array(branches, np.int64))

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
            fetch = to_host(self.lm.window_blocks(state, begin, len(part), s))
            padded = np.pad(part, (0, -len(part) % s.block))
            self.store.add_packed([branch], begin, padded[None], fetch, tokens=len(part))
            if progress is not None:
                progress(begin + len(part), len(text))
        self.store.complete(branch)
        return branch

    def search(self, ids: Sequence[int], count: int) -> np.ndarray:
        """Slots of the blocks that a text, put to a fresh model, looks for; best first."""
        inner = self.init_state().inner
        _, probe = self.lm.prefill(np.asarray([ids], np.int32), inner)
        queries = as_numpy(probe.layers[self.store.shape.router].queries)[0, -min(len(ids), self.queries) :]
        return self.store.choose(self._as_asked(queries), self.store.visible(self.store.next_id, 0, 0), count)


def _check_fits(store: Store, config: Config) -> None:
    """Raise StoreError unless the store's sizes are ones of this model."""
    shape, want = store.shape, shape_for(config, store.shape.block, store.shape.pool)
    able = {i for i, kind in enumerate(config.layer_types) if kind == "bmojo"}
    if not able.issuperset((*shape.layers, shape.router)) or shape[3:] != want[3:]:
        raise StoreError(f"{store.folder}: keeps {shape}, which this model has not; make a new store")


def _joined_shares(parts: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The shares (b, h, t) of one layer from those of the parts of a call."""
    return {name: np.concatenate([as_numpy(part[name]) for part in parts], axis=-1) for name in parts[0]}


def _dtype(config: Config) -> np.dtype[Any]:
    import ml_dtypes  # noqa: F401 - gives NumPy bfloat16

    return np.dtype(config.dtype)


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
