"""A language model for tests of what stands on models: NumPy, deterministic, its whole past in one number."""

from __future__ import annotations

from typing import Any

import numpy as np

from bmojo_edge.config import Config
from bmojo_edge.state import State
from bmojo_edge.tokenizer import Tokenizer


class FakeLM:
    """Logits depend on every token fed so far and on nothing else; `fed` records what each call was given.

    `script`, where given, are the ids it greedily says at positions `start`, `start` + 1, ...
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int | None = None, sharpness: float = 3.0) -> None:
        assert tokenizer is not None or vocab_size is not None
        size = vocab_size if tokenizer is None or vocab_size is not None else tokenizer.vocab_size
        self.config = Config.preset("tiny", vocab_size=size)
        self.tokenizer = tokenizer
        self.fed: list[list[int]] = []
        self.pasts: dict[int, list[int]] = {7: []}  # the ids that a state has taken in, by the number that it is
        self.script: list[int] = []
        self.start = 0
        self._sharpness = sharpness

    def says(self, ids: list[int], start: int) -> None:
        self.script, self.start = ids, start

    def init_state(self, batch: int = 1, offset: int = 0) -> State:
        return _frozen(np.full(batch, 7, np.uint64), np.zeros(batch, np.int64), np.full(batch, offset, np.int64))

    def prefill(self, tokens: Any, state: State, lengths: Any = None) -> tuple[np.ndarray, State]:
        (row,) = np.asarray(tokens).tolist()
        assert lengths is None and len(row) > 0
        self.fed.append(row)
        past = int(state.layers[0][0])
        for token in row:
            assert 0 <= token < self.config.vocab_size
            past = (past * 6364136223846793005 + token + 1442695040888963407) % 2**64
        self.pasts[past] = self.pasts[int(state.layers[0][0])] + row
        position = int(state.position[0]) + len(row)
        logits = np.random.default_rng(past).normal(size=self.config.vocab_size) * self._sharpness
        if 0 <= position - self.start < len(self.script):
            logits[self.script[position - self.start]] = 100.0
        new = _frozen(np.array([past], np.uint64), np.array([position]), state.offset)
        return logits.astype(np.float32)[None], new

    def decode_one_token(self, token: Any, state: State, active: Any = None) -> tuple[np.ndarray, State]:
        assert active is None
        return self.prefill(np.asarray(token)[:, None], state)

    def all_fed(self) -> list[int]:
        return [token for call in self.fed for token in call]


def _frozen(past: np.ndarray, position: np.ndarray, offset: np.ndarray) -> State:
    for array in (past, position, offset):
        array.flags.writeable = False
    return State((past,), position, offset)
