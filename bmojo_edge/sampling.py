"""Choosing the next token from logits: NumPy only, the same for every engine.

The steps and their order are transformers': repetition penalty, temperature, top-k, top-p, min-p, then one draw.
This module sees one row of logits at a time; it knows nothing of models or text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Flags = NDArray[np.bool_]


class SamplingError(ValueError):
    """An option of sampling is out of range; the message names it."""


class LogitsError(ArithmeticError):
    """A model's logits are not numbers, so no token can be chosen."""


def _number(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        x = float(value)
        if math.isfinite(x) and low <= x <= high and not (open_low and x == low):
            return
    start = f"greater than {low:g}" if open_low else f"at least {low:g}"
    end = f" and at most {high:g}" if math.isfinite(high) else ""
    raise SamplingError(f"{name}: must be a number {start}{end}, got {value!r}")


def check_count(name: str, value: object) -> None:
    """Raises SamplingError unless `value` is a whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise SamplingError(f"{name}: must be a whole number of at least 0, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Raises SamplingError naming the field that is out of range.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 do nothing. The penalty
    (CTRL, arXiv 1909.05858) divides positive and multiplies negative logits of tokens seen before. `seed` makes a run
    repeatable on every machine that gives the same logits; None draws a new one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, math.inf)
        _number("top_p", self.top_p, 0.0, 1.0)
        check_count("top_k", self.top_k)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        if self.seed is not None:
            check_count("seed", self.seed)


class Choice(NamedTuple):
    """A sampled token and its natural-log probability under the model's own distribution."""

    id: int
    logprob: float  # before penalty, temperature and filters


def candidates(logits: Floats, sampling: Sampling, seen: Flags) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The tokens that can be drawn, ids ascending, and their probabilities, which sum to 1; `temperature` > 0."""
    scores = penalised(logits, sampling.repetition_penalty, seen)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the likeliest to -inf
        scores = (scores - scores.max()) / np.float32(max(sampling.temperature, 1e-37))
    ids = np.arange(scores.size)
    if 0 < sampling.top_k < scores.size:
        kth = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        ids = np.flatnonzero(scores >= kth)
    p = _normalised(np.exp(scores[ids]))
    if sampling.top_p < 1.0:
        kept = np.sort(_nucleus(p, sampling.top_p))
        ids, p = ids[kept], _normalised(p[kept])
    if sampling.min_p > 0.0:
        kept = p >= sampling.min_p * p.max()
        ids, p = ids[kept], _normalised(p[kept])
    return ids, p


def penalised(logits: Floats, penalty: float, seen: Flags) -> NDArray[np.float32]:
    """A float32 copy of logits (v,) with tokens in `seen` (v,) made less likely by `penalty` > 1."""
    scores = logits.astype(np.float32)
    if penalty != 1.0:
        repeated, most = scores[seen].astype(np.float64), np.finfo(np.float32).max
        with np.errstate(over="ignore"):  # a penalty near 0 or beyond all measure: as far as numbers go
            repeated = np.where(repeated < 0, repeated * penalty, repeated / penalty)
        scores[seen] = np.clip(repeated, -most, most)
    return scores


def _normalised(p: Floats) -> NDArray[np.float64]:
    return p / p.sum(dtype=np.float64)


def _nucleus(p: NDArray[np.float64], mass: float) -> NDArray[np.intp]:
    """Indices of the fewest likeliest entries whose probabilities reach `mass`, at least one."""
    size = 64
    while size < p.size:  # sorting a whole vocabulary takes longer than many a model's step
        top = np.argpartition(p, -size)[-size:]
        if p[top].sum() >= mass:
            break
        size *= 8
    else:
        top = np.arange(p.size)
    descending = top[np.lexsort((top, -p[top]))]
    reached = np.cumsum(p[descending])
    return descending[: 1 + int(np.searchsorted(reached[:-1], mass))]


class Sampler:
    """Draws tokens one after another, remembering which were seen for the repetition penalty.

    `context` are ids seen before the first draw: the prompt, or a session's last `window` tokens. `rng` are the random
    numbers to go on from where there is no seed.
    """

    def __init__(
        self,
        sampling: Sampling,
        vocab_size: int,
        context: Iterable[int] = (),
        rng: np.random.Generator | None = None,
    ) -> None:
        self.sampling = sampling
        self._rng = rng if rng is not None and sampling.seed is None else np.random.default_rng(sampling.seed)
        self._seen = np.zeros(vocab_size, dtype=np.bool_)
        self._seen[list(context)] = True

    def choose(self, logits: Floats) -> Choice:
        """The next token from logits (v,). Raises LogitsError where they are not numbers."""
        top = float(logits.max())
        if not math.isfinite(top):  # a NaN anywhere makes the maximum NaN
            raise LogitsError(f"logits: their maximum is {top}; the model computed something that is not a number")
        if self.sampling.temperature == 0.0:
            penalty = self.sampling.repetition_penalty
            chosen = int((logits if penalty == 1.0 else penalised(logits, penalty, self._seen)).argmax())
        else:
            ids, p = candidates(logits, self.sampling, self._seen)
            cumulative = np.cumsum(p)
            drawn = np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right")
            chosen = int(ids[min(drawn, np.searchsorted(cumulative, cumulative[-1]))])
        self._seen[chosen] = True
        spread = np.exp(logits - top).sum(dtype=np.float64)
        return Choice(chosen, float(logits[chosen]) - top - math.log(spread))
