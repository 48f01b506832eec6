"""A conversation at one moment: the state, and the little that must be known of the token ids behind it.

A moment is a value of bounded size: the ids of the last `window` tokens and of those the memories keep, never of the
whole past. This module knows ids and states; it knows nothing of texts, templates or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bmojo_edge.config import Config
from bmojo_edge.engine import state_nbytes
from bmojo_edge.state import BMojoState
from bmojo_edge.tensors import as_numpy

_PRIME, _BASE = 2**61 - 1, 0x1F0A2B3C4D5E6F71 % (2**61 - 1)


class Moment(NamedTuple):
    """Everything a conversation goes on from. `pending` are ids that belong to it and are not in the state yet."""

    state: Any
    pending: tuple[int, ...]
    recent: tuple[int, ...]  # the last `window` ids of the state, then the pending ones
    rolling_hash: int  # of all ids, pending ones too: equal for equal pasts
    kept: Mapping[int, int]  # id by position of every sink and eidetic token of any layer
    draws: Any  # the random numbers' state (NumPy's, of PCG64), from which unseeded sampling goes on

    @property
    def position(self) -> int:
        """Tokens so far."""
        return int(self.state.position[0]) + len(self.pending)

    @property
    def read(self) -> tuple[int, ...]:
        """The last `window` ids of the state."""
        return self.recent[: len(self.recent) - len(self.pending)]

    @property
    def nbytes(self) -> int:
        """Bytes of the state's arrays."""
        return state_nbytes(self.state)

    def generator(self) -> np.random.Generator:
        """The random numbers of this moment."""
        bits = np.random.PCG64()
        bits.state = self.draws
        return np.random.Generator(bits)

    def after(self, ids: Sequence[int], state: Any, pending: Sequence[int], config: Config) -> Moment:
        """The moment `ids` later, when `state` has taken in all but the last ones, `pending`."""
        known = (*self.recent, *ids)  # all that a memory can have taken up since, besides what it kept already
        first = self.position + len(ids) - len(known)
        kept = {p: known[p - first] if p >= first else self.kept[p] for p in kept_positions(state, config)}
        recent = known[max(0, len(known) - config.window - len(pending)) :]
        return Moment(state, tuple(pending), recent, _hashed(self.rolling_hash, ids), kept, self.draws)


def first_moment(state: Any, seed: int | None) -> Moment:
    """Before the first token."""
    return Moment(state, (), (), 0, {}, np.random.PCG64(seed).state)


def branched(draws: Any, branch: int) -> Any:
    """Random numbers of a fork: repeatable, and apart from those they come from and from other branches."""
    words = np.frombuffer(int(draws["state"]["state"]).to_bytes(16, "little"), np.uint32)
    return np.random.PCG64(np.random.SeedSequence([*words.tolist(), branch])).state


def kept_positions(state: Any, config: Config) -> list[int]:
    """Positions of the sinks and eidetic tokens that any layer holds, ascending."""
    layers = [layer for layer in state.layers if isinstance(layer, BMojoState)]
    found: set[int] = set()
    if any(layer.sinks for layer in layers):
        found |= set(range(min(config.n_sinks, int(state.position[0]))))
    for layer in layers:
        if layer.eidetic:
            positions = as_numpy(layer.eidetic.positions)[0]
            found |= set(positions[positions >= 0].tolist())
    return sorted(found)


def _hashed(start: int, ids: Sequence[int]) -> int:
    """Rabin and Karp's polynomial modulo a prime: the same however the ids are cut into calls."""
    value = start
    for i in ids:
        value = (value * _BASE + i + 1) % _PRIME
    return value
