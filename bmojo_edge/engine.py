"""What generation asks of a model, whichever engine it runs on, and where its arrays become NumPy.

This is the only module of the neutral side that looks at what an array is made of; it imports no engine itself until
it is handed one's arrays.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bmojo_edge.config import Config
from bmojo_edge.state import leaves
from bmojo_edge.tokenizer import Tokenizer


class LM(Protocol):
    """A language model with its tokenizer. States are values: a call leaves the state it was given as it was."""

    @property
    def config(self) -> Config: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    def init_state(self, batch: int = 1, offset: int = 0) -> Any: ...

    def prefill(self, tokens: Any, state: Any, lengths: Any = None) -> tuple[Any, Any]: ...

    def decode_one_token(self, token: Any, state: Any, active: Any = None) -> tuple[Any, Any]: ...


def evaluate(logits: Any, state: Any) -> NDArray[np.float32]:
    """The logits (v,) of a batch of one in NumPy, with the state evaluated beside them where the engine is lazy.

    Callers rebind their state first: a ring that an old state still holds is copied (docs/model.md, the state).
    """
    engine = type(logits).__module__.partition(".")[0]
    if engine == "mlx":
        import mlx.core as mx

        logits = logits.astype(mx.float32)  # NumPy has no bfloat16
        mx.eval(logits, state)
    elif engine == "torch":
        logits = logits.detach().float().cpu()
    return np.asarray(logits, dtype=np.float32)[0]


def state_nbytes(state: Any) -> int:
    """Bytes of the arrays of a state."""
    return sum(leaf.nbytes for _, leaf in leaves(state))
