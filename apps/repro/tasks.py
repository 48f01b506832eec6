"""Synthetic recall, as NumPy arrays: what a model reads and what it must answer, from a seed.

A task is a function `(rng, n, seq_len, pairs, ...) -> Examples`; nothing here knows of models. `multi_query` is MQAR
as Zoology defines it (Arora et al., arXiv 2312.04927, appendix E); the others follow the Mechanistic Architecture
Design suite (Poli et al., arXiv 2403.17844, section 3) and, for induction heads, Mamba (arXiv 2312.00752, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

IGNORED = -1  # a target that is not scored


class Examples(NamedTuple):
    """n sequences; a target is the token the model must predict having read up to and with its column."""

    tokens: np.ndarray  # (n, t) int64
    targets: np.ndarray  # (n, t) int64, IGNORED where nothing is asked


class Task(NamedTuple):
    """A task's generator and the number of distinct tokens it uses."""

    make: Callable[..., Examples]
    vocab_size: int


def _distinct(rng: Generator, n: int, low: int, high: int, count: int) -> np.ndarray:
    """n rows of `count` different integers of [low, high), in random order."""
    if count * count > 2 * (high - low):  # fewer than one draw in three would have no integer twice
        return rng.permuted(np.tile(np.arange(low, high), (n, 1)), axis=1)[:, :count]
    rows = rng.integers(low, high, (n, count))
    left = np.arange(n)
    while len(left):
        ordered = np.sort(rows[left], axis=1)
        left = left[(ordered[:, 1:] == ordered[:, :-1]).any(axis=1)]
        rows[left] = rng.integers(low, high, (len(left), count))
    return rows


def _empty(tokens: np.ndarray) -> np.ndarray:
    return np.full_like(tokens, IGNORED)


def multi_query(rng: Generator, n: int, seq_len: int, pairs: int, alpha: float = 0.01) -> Examples:
    """MQAR: `pairs` keys and values, then each key once more at a slot drawn with p(j) ~ j^(alpha - 1).

    Keys are of 1 .. 4095, values of 4096 .. 8191, each different within a row; all else is 0.
    """
    slots = (seq_len - 2 * pairs) // 2
    if slots < pairs:
        raise ValueError(f"seq_len: {seq_len} leaves {slots} slots for the queries of {pairs} pairs")
    keys = _distinct(rng, n, 1, 4096, pairs)
    values = _distinct(rng, n, 4096, 8192, pairs)
    tokens = np.zeros((n, seq_len), np.int64)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    # Weighted draws without replacement are the order of independent exponential arrival times (Efraimidis, Spirakis).
    weight = np.arange(1, slots + 1, dtype=np.float64) ** (alpha - 1)
    slot = (rng.exponential(size=(n, slots)) / weight).argsort(axis=1)[:, :pairs]
    columns = 2 * pairs + 2 * slot
    targets, rows = _empty(tokens), np.arange(n)[:, None]
    tokens[rows, columns], targets[rows, columns] = keys, values
    return Examples(tokens, targets)


def far_queries(rng: Generator, n: int, seq_len: int, pairs: int) -> Examples:
    """MQAR whose pairs stand at the start and whose queries, in random order, at the very end: recall at a distance."""
    gap = seq_len - 4 * pairs
    if gap < 0:
        raise ValueError(f"seq_len: {seq_len} is too short for {pairs} pairs and their queries")
    near = multi_query(rng, n, 4 * pairs, pairs)
    blank = np.zeros((n, gap), np.int64)
    tokens = np.concatenate([near.tokens[:, : 2 * pairs], blank, near.tokens[:, 2 * pairs :]], axis=1)
    targets = np.concatenate([near.targets[:, : 2 * pairs], blank + IGNORED, near.targets[:, 2 * pairs :]], axis=1)
    return Examples(tokens, targets)


def selective_copying(rng: Generator, n: int, seq_len: int, pairs: int, vocab: int = 16) -> Examples:
    """`pairs` tokens lie scattered among blanks; after a mark they must be given back in their order.

    Tokens are 2 .. vocab - 1, 0 is the blank, 1 the mark; each answer is asked for at a mark of its own.
    """
    context = seq_len - pairs
    if context < pairs:
        raise ValueError(f"seq_len: {seq_len} is too short to copy {pairs} tokens")
    tokens = np.zeros((n, seq_len), np.int64)
    content = rng.integers(2, vocab, (n, pairs))
    rows = np.arange(n)[:, None]
    tokens[rows, np.sort(_distinct(rng, n, 0, context, pairs), axis=1)] = content
    tokens[:, context:] = 1
    targets = _empty(tokens)
    targets[:, context:] = content
    return Examples(tokens, targets)


def induction_heads(rng: Generator, n: int, seq_len: int, pairs: int = 1, vocab: int = 16) -> Examples:
    """One special token stands somewhere; at the end it comes again, and what followed it is asked for.

    Tokens are 1 .. vocab - 1, the special one 0. `pairs` must be 1.
    """
    if pairs != 1 or seq_len < 4:
        raise ValueError(f"induction heads have one pair and at least 4 tokens, got {pairs} and {seq_len}")
    tokens = rng.integers(1, vocab, (n, seq_len))
    at = rng.integers(0, seq_len - 2, n)
    tokens[np.arange(n), at] = 0
    tokens[:, -1] = 0
    targets = _empty(tokens)
    targets[:, -1] = tokens[np.arange(n), at + 1]
    return Examples(tokens, targets)


def noisy_recall(
    rng: Generator, n: int, seq_len: int, pairs: int, share: float = 0.4, vocab: int = 128, noise: int = 32
) -> Examples:
    """Pairs from a dictionary of `pairs` keys, drawn again and again, with noise between: value of a key seen before.

    Keys are 0 .. vocab/2 - 1 and values vocab/2 .. vocab - 1; a slot of two tokens is noise, of vocab and above, with
    probability `share`.
    """
    half = vocab // 2
    if pairs > half:
        raise ValueError(f"pairs: at most {half} keys, got {pairs}")
    slots = seq_len // 2
    keys = _distinct(rng, n, 0, half, pairs)
    values = rng.integers(half, vocab, (n, pairs))
    which = rng.integers(0, pairs, (n, slots))
    rows = np.arange(n)[:, None]
    key, value = keys[rows, which], values[rows, which]
    noisy = rng.random((n, slots)) < share
    clutter = rng.integers(vocab, vocab + noise, (n, slots, 2))
    pair = np.where(noisy[..., None], clutter, np.stack([key, value], axis=-1))
    tokens = np.zeros((n, seq_len), np.int64)
    tokens[:, : 2 * slots] = pair.reshape(n, 2 * slots)
    targets = _empty(tokens)
    targets[:, 0 : 2 * slots : 2] = np.where(_seen(which, noisy), value, IGNORED)
    return Examples(tokens, targets)


def _seen(which: np.ndarray, skip: np.ndarray) -> np.ndarray:
    """Where `which` (n, slots), outside `skip`, names something an earlier slot outside `skip` named."""
    code = np.where(skip, -1, which)
    earlier = np.tril(np.ones((code.shape[1],) * 2, bool), -1)
    return ((code[:, :, None] == code[:, None, :]) & earlier).any(axis=2) & ~skip


def fuzzy_recall(rng: Generator, n: int, seq_len: int, pairs: int, vocab: int = 128, longest: int = 3) -> Examples:
    """Recall whose keys and values are one to `longest` tokens long: every token of a value is asked for.

    Keys are spelled with 0 .. vocab/2 - 1, values with vocab/2 .. vocab - 1; the rest of a row is padded with `vocab`.
    """
    half = vocab // 2
    tokens = np.full((n, seq_len), vocab, np.int64)
    targets = _empty(tokens)
    for row in range(n):
        entries, seen, column = _dictionary(rng, pairs, half, vocab, longest), set(), 0
        while True:
            key, value = entries[rng.integers(pairs)]
            end = column + len(key) + len(value)
            if end > seq_len:
                break
            tokens[row, column:end] = [*key, *value]
            if key in seen:
                targets[row, column + len(key) - 1 : end - 1] = value
            seen.add(key)
            column = end
    return Examples(tokens, targets)


def _dictionary(
    rng: Generator, pairs: int, half: int, vocab: int, longest: int
) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """Keys none of which begins another, so that each is recognised at its last token, with their values."""
    entries: list[tuple[tuple[int, ...], np.ndarray]] = []
    while len(entries) < pairs:
        key = tuple(int(k) for k in rng.integers(0, half, rng.integers(1, longest + 1)))
        if not any(key[: len(other)] == other[: len(key)] for other, _ in entries):
            entries.append((key, rng.integers(half, vocab, rng.integers(1, longest + 1))))
    return entries


TASKS: dict[str, Task] = {
    "mqar": Task(multi_query, 8192),
    "far_queries": Task(far_queries, 8192),
    "selective_copying": Task(selective_copying, 16),
    "induction_heads": Task(induction_heads, 16),
    "noisy_recall": Task(noisy_recall, 160),
    "fuzzy_recall": Task(fuzzy_recall, 129),
}
