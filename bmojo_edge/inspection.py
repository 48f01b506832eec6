"""What a model remembers at a moment, and which memories its last answer was read from (docs/sessions.md).

Nothing of this is computed while decoding: kept tokens are in the state, and attention is computed again for the last
answer's tokens, from the moment before its question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from bmojo_edge.engine import LM, evaluate
from bmojo_edge.moment import Moment, first_moment
from bmojo_edge.recall import WithStorage
from bmojo_edge.session import BLOCK, Session, SessionError
from bmojo_edge.state import MEMORIES, BMojoState
from bmojo_edge.steps import Steps, finished
from bmojo_edge.tensors import as_numpy

Shares = dict[str, float]  # by the names of MEMORIES; together 1
UNTOLD = "an export does not tell where it goes"


@runtime_checkable
class Watched(Protocol):
    """A language model that tells how its attention divides, as both twins do."""

    def prefill_with_attention(self, tokens: Any, state: Any) -> tuple[Any, Any, list[dict[str, Any]]]: ...


@dataclass(frozen=True, slots=True)
class Kept:
    """A token that is kept verbatim beyond the window. `age` counts the tokens since."""

    position: int
    age: int
    id: int
    text: str
    innovation: float | None  # None: a sink, which is kept for its place


@dataclass(frozen=True, slots=True)
class Layer:
    """The memories of one layer; `attention` is empty where there is none, or nothing to tell of."""

    kind: str
    sinks: tuple[Kept, ...] = ()
    eidetic: tuple[Kept, ...] = ()
    attention: Shares = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is remembered at `position`. `attention` is the mean of the layers that have it.

    `queries` counts the tokens whose attention it is; where there are none, `unknown` says why.
    """

    position: int
    layers: tuple[Layer, ...]
    attention: Shares
    queries: int
    unknown: str = ""

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


def inspect(session: Session) -> Inspection:
    """What a session remembers, and how the attention of its last answer divided among the memories.

    The answer's tokens are those it was chosen by: the last one of the question's, and its own but the last.
    """
    return finished(inspecting(session))


def kept(session: Session) -> Inspection:
    """What a session remembers, without the attention: nothing is computed."""
    return _inspection(session.lm, session.moment, [], 0, "where the last answer looked was not asked for")


def inspecting(session: Session) -> Steps[Inspection]:
    """`inspect`, stopping after each piece of work so that the model can do something else in between."""
    lm, now = session.lm, session.moment
    if not isinstance(lm, Watched):
        return _inspection(lm, now, [], 0, UNTOLD)
    try:
        state, ids, answer = session.last_exchange()
    except SessionError as error:
        return _inspection(lm, now, [], 0, str(error))
    if isinstance(lm, WithStorage):
        lm, state = lm.before_answer(ids, state, now.state)
        ids = ids[-1:]
    for i in range(0, len(ids) - 1, BLOCK):
        logits, state = lm.prefill(np.array([ids[i : min(i + BLOCK, len(ids) - 1)]], np.int32), state)
        evaluate(logits, state)
        yield
    choosing = [ids[-1], *answer[:-1]]
    _, attention = yield from _attention(lm, state, choosing)
    return _inspection(lm, now, attention, len(choosing))


def inspect_text(lm: LM, ids: Sequence[int]) -> Inspection:
    """What a model remembers after reading token ids, and how the attention of the last of them divides."""
    if not ids:
        raise ValueError("ids: there must be at least one token to read")
    state = lm.init_state()
    start = first_moment(state, None)
    if len(ids) > 1:
        logits, state = lm.prefill(np.array([ids[:-1]], np.int32), state)
        evaluate(logits, state)
    if isinstance(lm, Watched):
        state, attention = finished(_attention(lm, state, ids[-1:]))
        return _inspection(lm, start.after(ids, state, (), lm.config), attention, 1)
    logits, state = lm.decode_one_token(np.array(ids[-1:], np.int32), state)
    evaluate(logits, state)
    return _inspection(lm, start.after(ids, state, (), lm.config), [], 0, UNTOLD)


def _attention(lm: Any, state: Any, tokens: Sequence[int]) -> Steps[tuple[Any, list[Shares]]]:
    """The state after the tokens, and each layer's shares, means of heads and tokens."""
    watched: Watched = lm
    sums: list[Shares] = [{} for _ in lm.config.layer_types]
    for i in range(0, len(tokens), BLOCK):
        logits, state, shares = watched.prefill_with_attention(np.array([tokens[i : i + BLOCK]], np.int32), state)
        evaluate(logits, state)
        for total, layer in zip(sums, shares, strict=True):
            for name, share in layer.items():
                total[name] = total.get(name, 0.0) + float(as_numpy(share).mean(1).sum())
        yield
    return state, [{name: total / len(tokens) for name, total in layer.items()} for layer in sums]


def _mean(shares: Sequence[Shares]) -> Shares:
    told = [layer for layer in shares if layer]
    return {name: sum(layer.get(name, 0.0) for layer in told) / len(told) for name in MEMORIES} if told else {}


def _inspection(lm: LM, now: Moment, attention: Sequence[Shares], queries: int, unknown: str = "") -> Inspection:
    end, texts = now.position, _texts(lm, now)

    def token(position: int, innovation: float | None) -> Kept:
        return Kept(position, end - 1 - position, now.kept[position], texts[position], innovation)

    layers = []
    for i, (kind, state) in enumerate(zip(lm.config.layer_types, now.state.layers, strict=True)):
        sinks: tuple[Kept, ...] = ()
        eidetic: tuple[Kept, ...] = ()
        if isinstance(state, BMojoState) and state.sinks:
            sinks = tuple(token(p, None) for p in range(lm.config.n_sinks) if p in now.kept)
        if isinstance(state, BMojoState) and state.eidetic:
            slots = zip(as_numpy(state.eidetic.positions)[0], as_numpy(state.eidetic.scores)[0], strict=True)
            eidetic = tuple(token(int(p), float(score)) for p, score in slots if p >= 0)
        layers.append(Layer(kind, sinks, eidetic, _mean(attention[i : i + 1])))
    overall = _mean(attention)
    return Inspection(end, tuple(layers), overall, queries if overall else 0, unknown)


def _texts(lm: LM, now: Moment) -> dict[int, str]:
    """The text of each kept token by position."""
    assert lm.tokenizer is not None
    text = {token: lm.tokenizer.decode([token]) for token in set(now.kept.values())}
    return {position: text[token] for position, token in now.kept.items()}
