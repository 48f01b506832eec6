"""How likely a model finds texts: log-likelihoods of continuations in ragged batches, and batched generation.

A context that several continuations share is read once and its state forked. It works on either twin, on ids; what
compares two models also works on exports. It knows nothing of tasks, files or metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from bmojo_edge.engine import LM, as_engine, evaluate, take_rows, token_logprobs, without_gradients
from bmojo_edge.generate import prompt_ids
from bmojo_edge.sampling import Sampler, Sampling
from bmojo_edge.stopping import StopStrings
from bmojo_edge.tensors import as_numpy
from bmojo_edge.tokenizer import Tokenizer

TOKENS = 512  # of which logits are held at one time
BLOCK = 64  # the fewest columns computed at one time, however many rows

Progress = Callable[[int, int], None]


class Scorer(LM, Protocol):
    """A model that shows what its head reads."""

    def hidden(self, tokens: Any, state: Any = None, *, lengths: Any = None) -> tuple[Any, Any]: ...

    def head(self, hidden: Any) -> Any: ...


class Request(NamedTuple):
    """Ids of a context, at least one, and of what follows it."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Score(NamedTuple):
    """Of a continuation: natural-log probability, whether greedy decoding says the same, and its tokens."""

    logprob: float
    greedy: bool
    tokens: int


class Asked(NamedTuple):
    """A prompt to continue, and how."""

    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = Sampling()


def request(lm: LM, context: str, continuation: str) -> Request:
    """The ids of two texts that follow each other, cut as lm-evaluation-harness cuts them.

    White space that ends the context begins the continuation; an empty context is the token that begins a text.
    """
    assert lm.tokenizer is not None
    kept = context.rstrip()
    continuation, tokenizer = context[len(kept) :] + continuation, lm.tokenizer
    if not kept:
        return Request(beginning(lm), tuple(tokenizer.encode(continuation, add_special_tokens=False)))
    before, whole = tokenizer.encode(kept), tokenizer.encode(kept + continuation)
    if whole[: len(before)] == before:
        return Request(tuple(before), tuple(whole[len(before) :]))
    return Request(tuple(before), tuple(tokenizer.encode_continuation(continuation)))  # a token across the border


def beginning(lm: LM) -> tuple[int, ...]:
    """What a text that follows nothing is read after."""
    return tuple(prompt_ids(lm, ""))


def loglikelihoods(
    lm: Scorer, requests: Sequence[Request], batch: int = 8, progress: Progress = lambda done, total: None
) -> list[Score]:
    """Scores in the order of the requests; at most `batch` sequences are computed together.

    progress(done, total) counts tokens of continuations. Raises ValueError naming a request without a context.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(requests):
        if not one.context:
            raise ValueError(f"requests[{i}]: the context is empty; begin with the token that begins a text")
        groups.setdefault(one.context, []).append(i)
    contexts = sorted(groups, key=len, reverse=True)  # the largest first: too much memory is known at once
    scores, done = [Score(0.0, True, 0)] * len(requests), 0
    total = sum(len(one.continuation) for one in requests)

    def tick(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total)

    for begin in range(0, len(contexts), batch):
        together = contexts[begin : begin + batch]
        with without_gradients():
            for i, score in _score_contexts(lm, requests, together, groups, batch, tick):
                scores[i] = score
    return scores


def _score_contexts(
    lm: Scorer,
    requests: Sequence[Request],
    contexts: Sequence[tuple[int, ...]],
    groups: dict[tuple[int, ...], list[int]],
    batch: int,
    tick: Callable[[int], None],
) -> Iterator[tuple[int, Score]]:
    """Every continuation of some contexts: their first tokens from the contexts' logits, the rest from forks."""
    tokens, lengths = _padded(contexts)
    logits, state = lm.prefill(tokens, lm.init_state(len(contexts)), lengths)
    asked = [(row, i) for row, context in enumerate(contexts) for i in groups[context] if requests[i].continuation]
    asked.sort(key=lambda pair: len(requests[pair[1]].continuation), reverse=True)
    for begin in range(0, len(asked), batch):
        rows, indices = zip(*asked[begin : begin + batch], strict=True)
        followed = [requests[i].continuation for i in indices]
        targets, counts = _padded(followed)
        first = np.array(targets[:, :1])
        logprobs, best = token_logprobs(_rows(logits, rows)[:, None], first, state)
        tick(len(rows))
        sums, greedy = logprobs[:, 0].astype(np.float64), best[:, 0].copy()
        if targets.shape[1] > 1:
            forked = take_rows(state, rows)
            for columns, logprobs, best in _walk(lm, targets, counts - 1, forked):
                real = columns[None] < counts[:, None] - 1
                sums += np.where(real, logprobs, 0).sum(-1, dtype=np.float64)
                greedy &= (best | ~real).all(-1)
                tick(int(real.sum()))
        for i, total, same in zip(indices, sums.tolist(), greedy.tolist(), strict=True):
            yield i, Score(total, same, len(requests[i].continuation))


def _walk(
    lm: Scorer, tokens: np.ndarray, lengths: np.ndarray, state: Any
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(columns, log-probabilities, likeliest?) of the tokens that follow the first `lengths` (b,) of tokens (b, t)."""
    b, t = tokens.shape
    size = max(BLOCK, TOKENS // b)
    for begin in range(0, t - 1, size):
        end = min(begin + size, t - 1)
        left = np.clip(lengths - begin, 0, end - begin)
        out, state = lm.hidden(tokens[:, begin:end], state, lengths=left)
        found = token_logprobs(lm.head(out), np.array(tokens[:, begin + 1 : end + 1]), state)
        yield np.arange(begin, end), *found


def continuations(
    lm: LM, asked: Sequence[Asked], batch: int = 8, progress: Progress = lambda done, total: None
) -> list[str]:
    """The answer to each prompt, without its stop string; at most `batch` are written together."""
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt), reverse=True)
    texts = [""] * len(asked)
    for begin in range(0, len(order), batch):
        together = order[begin : begin + batch]
        for i, text in zip(together, _continue(lm, [asked[i] for i in together]), strict=True):
            texts[i] = text
        progress(begin + len(together), len(asked))
    return texts


class _Row:
    """One answer being written."""

    def __init__(self, lm: LM, tokenizer: Tokenizer, asked: Asked) -> None:
        self.text = ""
        self.on = asked.max_tokens > 0
        self._left = asked.max_tokens
        self._eos_ids = tokenizer.eos_ids
        self._sampler = Sampler(asked.sampling, lm.config.vocab_size, asked.prompt)
        self._stop = StopStrings(asked.stop)
        self._detokenizer = tokenizer.detokenizer()

    def write(self, logits: np.ndarray) -> int:
        """Choose the next token from logits (v,), and end where it says so."""
        chosen = self._sampler.choose(logits).id
        self._left -= 1
        ended = chosen in self._eos_ids
        if not ended:
            self.text += self._stop.feed(self._detokenizer.feed(chosen))
        if ended or self._left == 0:
            self.text += self._stop.feed(self._detokenizer.finish()) + self._stop.finish()
        self.on = not (ended or self._left == 0 or self._stop.hit)
        return chosen


def _continue(lm: LM, asked: Sequence[Asked]) -> list[str]:
    assert lm.tokenizer is not None
    rows = [_Row(lm, lm.tokenizer, one) for one in asked]
    tokens, lengths = _padded([one.prompt for one in asked])
    logits, state = lm.prefill(tokens, lm.init_state(len(rows)), lengths)
    while any(row.on for row in rows):
        values = as_numpy(logits).astype(np.float32)
        active = np.array([row.on for row in rows])
        chosen = [row.write(values[i]) if row.on else 0 for i, row in enumerate(rows)]
        active &= [row.on for row in rows]
        if active.any():
            logits, state = lm.decode_one_token(np.array(chosen, np.int64), state, active)
    return [row.text for row in rows]


def predictions(lm: LM, ids: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Natural-log probabilities (n, v), float64, of the token after each of n calls, which read `sizes` of ids (t,)."""
    state, at, found = lm.init_state(), 0, []
    for size in sizes:
        if size == 1:
            logits, state = lm.decode_one_token(ids[at : at + 1], state)
        else:
            logits, state = lm.prefill(ids[None, at : at + size], state)
        wide = evaluate(logits, state).astype(np.float64)
        wide -= wide.max()
        found.append(wide - np.log(np.exp(wide).sum()))
        at += size
    return np.stack(found)


def divergences(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """KL (n,) in nats of their predictions (n, v) from ours."""
    return (np.exp(ours) * (ours - theirs)).sum(-1)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids (b, t) padded on the right, and lengths (b,)."""
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.zeros((len(rows), lengths.max()), np.int64)
    for row, found in zip(ids, rows, strict=True):
        row[: len(found)] = found
    return ids, lengths


def _rows(array: Any, rows: Sequence[int]) -> Any:
    """Some rows of an engine's array, which may repeat."""
    return array[as_engine(np.array(rows, np.int64), array)]
