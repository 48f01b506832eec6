"""Texts into tokens by processes, in the order the texts came: every document in the frame its tokenizer gives it.

Knows the tokenizer and nothing of where texts come from or tokens go.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bmojo_edge.dataset import DatasetError, token_dtype
from bmojo_edge.tokenizer import Tokenizer


class Frame(NamedTuple):
    """Tokens around every document."""

    before: list[int]
    after: list[int]


def frame(tokenizer: Tokenizer, eos: bool | None) -> Frame:
    """What the tokenizer itself puts around a text, and its end-of-sequence token as `Settings.eos` says."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    if at is None:
        raise DatasetError(f"the tokenizer puts tokens inside a text: {plain} becomes {whole}")
    before, after, end = whole[:at], whole[at + len(plain) :], tokenizer.eos_id
    if eos and end is None:
        raise DatasetError("--eos: the tokenizer's files name no eos_token")
    if eos is False:
        after = [token for token in after if token != end]
    elif end is not None and end not in after:
        after = [*after, end]
    return Frame(before, after)


class Part(NamedTuple):
    """A piece with its place in its document."""

    text: str
    begins: bool
    ends: bool


class Encoded(NamedTuple):
    """Tokens of some pieces: little-endian bytes of all, and how many each piece has."""

    data: bytes
    counts: list[int]


class Encoder:
    """Cuts pieces of documents into tokens, each document in its frame."""

    def __init__(self, folder: Path, eos: bool | None) -> None:
        self.tokenizer = Tokenizer.load(folder)
        self.frame = frame(self.tokenizer, eos)
        self.dtype = np.dtype(token_dtype(self.tokenizer.vocab_size)).newbyteorder("<")

    def __call__(self, parts: list[Part]) -> Encoded:
        ids: list[int] = []
        counts = []
        for part in parts:
            before = len(ids)
            if part.begins:
                ids += self.frame.before
                ids += self.tokenizer.encode(part.text, add_special_tokens=False)
            else:
                ids += self.tokenizer.encode_continuation(part.text)
            if part.ends:
                ids += self.frame.after
            counts.append(len(ids) - before)
        return Encoded(np.array(ids, self.dtype).tobytes(), counts)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(folder: Path, eos: bool | None) -> None:
    """Leave Ctrl-C to the parent, end when it is gone, and load the tokenizer once."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    _encoder = Encoder(folder, eos)


def _work(parts: list[Part]) -> Encoded:
    assert _encoder is not None
    return _encoder(parts)


def in_order(tasks: Iterator[list[Part]], folder: Path, eos: bool | None, jobs: int) -> Iterator[Encoded]:
    """The tokens of all tasks in their order; a bounded number of tasks is held."""
    if jobs == 1:
        yield from map(Encoder(folder, eos), tasks)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of progress bars and tokenizers
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (folder, eos))
    running: deque[Future[Encoded]] = deque()
    try:
        for task in tasks:
            running.append(pool.submit(_work, task))
            if len(running) > 2 * jobs:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool:
        raise DatasetError("a worker process died, perhaps for want of memory; fewer --jobs need less") from None
    finally:
        pool.shutdown(cancel_futures=True)
