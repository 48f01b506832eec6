"""What generation asks of a model, whichever engine it runs on, and where its arrays become NumPy.

This is the only module of the neutral side that looks at what an array is made of; it imports no engine itself until
it is handed one's arrays.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bmojo_edge.config import Config
from bmojo_edge.state import leaves, map_leaves
from bmojo_edge.tensors import as_numpy
from bmojo_edge.tokenizer import Tokenizer

FINGERPRINT_VALUES = 64  # of each parameter


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
    return evaluate_rows(logits, state)[0]


def evaluate_rows(logits: Any, state: Any) -> NDArray[np.float32]:
    """The logits (b, v) of a batch in NumPy; otherwise as `evaluate`."""
    engine = type(logits).__module__.partition(".")[0]
    if engine == "mlx":
        import mlx.core as mx

        logits = logits.astype(mx.float32)  # NumPy has no bfloat16
        mx.eval(logits, state)
    elif engine == "torch":
        logits = logits.detach().float().cpu()
    return np.asarray(logits, dtype=np.float32)


def join_rows(states: Sequence[Any]) -> Any:
    """One state with the rows of several, in order; their arrays have the same shapes but for the rows."""
    engine = sys.modules[_MODULES.get(type(states[0].position).__module__.partition(".")[0], "numpy")]
    return _settled(map_leaves(lambda *parts: engine.concatenate(list(parts), 0), *states))


def take_rows(state: Any, rows: Sequence[int]) -> Any:
    """A state of some rows of another, copied: it keeps nothing of the other in memory."""
    chosen = as_engine(np.array(rows, np.int64), state.position)
    return _settled(map_leaves(lambda leaf: leaf[chosen], state))


_MODULES = {"mlx": "mlx.core", "torch": "torch"}


def _settled(state: Any) -> Any:
    """The state, evaluated where the engine is lazy, so that it no longer holds what it was made from."""
    if type(state.position).__module__.partition(".")[0] == "mlx":
        sys.modules["mlx.core"].eval(state)
    return state


def token_logprobs(logits: Any, targets: NDArray[np.int64], state: Any) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Natural-log probabilities (b, t) of targets (b, t) under logits (b, t, v), and whether each is the likeliest.

    The state is evaluated beside them where the engine is lazy; rows of the vocabulary never leave the device.
    """
    engine = type(logits).__module__.partition(".")[0]
    if engine == "mlx":
        import mlx.core as mx

        logits, ids = logits.astype(mx.float32), mx.array(targets)
        found = mx.take_along_axis(logits, ids[..., None], -1)[..., 0] - mx.logsumexp(logits, -1)
        best = mx.argmax(logits, -1) == ids
        mx.eval(found, best, state)
    else:
        torch = sys.modules["torch"]
        logits, ids = logits.float(), torch.from_numpy(targets).to(logits.device)
        found = (logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)).cpu()
        best = (logits.argmax(-1) == ids).cpu()
    return np.asarray(found), np.asarray(best)


def without_gradients() -> AbstractContextManager[Any]:
    """A context in which an engine that can differentiate keeps nothing for it."""
    torch = sys.modules.get("torch")
    return nullcontext() if torch is None else torch.no_grad()


def as_engine(array: np.ndarray, like: Any) -> Any:
    """A NumPy array as an array of the engine, and on the device, of `like`; bfloat16 as `ml_dtypes` has it.

    A GPU copies it while the host goes on: leave one that `host_array` made as it is from then on.
    """
    halves, engine = array.dtype.name == "bfloat16", type(like).__module__.partition(".")[0]
    bits = array.view(np.int16) if halves else array
    if engine == "mlx":
        mx = sys.modules["mlx.core"]
        return mx.array(bits).view(mx.bfloat16) if halves else mx.array(bits)
    if engine == "torch":
        torch = sys.modules["torch"]
        given = torch.from_numpy(bits if bits.flags.writeable and like.is_cuda else np.array(bits))
        tensor = given.view(torch.bfloat16) if halves else given
        if like.is_cuda and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(like.device, non_blocking=like.is_cuda)
    return np.array(bits)


def host_array(shape: Sequence[int], dtype: str, like: Any) -> np.ndarray:
    """An array of any content that `as_engine` hands to the engine and device of `like` without delay."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor) and like.is_cuda:
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype), pin_memory=True).numpy()
    return np.empty(shape, dtype)


def to_host(array: Any) -> Callable[[], np.ndarray]:
    """Begin to copy an array to the host; the result, called in any thread, waits for that alone and is NumPy's."""
    engine = type(array).__module__.partition(".")[0]
    if engine == "torch" and array.is_cuda:
        torch = sys.modules["torch"]
        host = torch.empty(array.shape, dtype=array.dtype, pin_memory=True)
        host.copy_(array, non_blocking=True)
        copied = torch.cuda.current_stream(array.device).record_event()

        def waited() -> np.ndarray:
            copied.synchronize()
            return as_numpy(host)

        return waited
    if engine == "mlx":
        sys.modules["mlx.core"].async_eval(array)
    return lambda: as_numpy(array)


def weights_fingerprint(lm: LM) -> str:
    """A hash of names, shapes and some values of each parameter, in milliseconds; "" where a model shows none.

    Both twins give the same for one folder, unless it is quantised: they hold those weights differently. An export has
    no parameters but a `fingerprint`, that of the model it was made from.
    """
    if told := getattr(lm, "fingerprint", None):
        return told
    named, nested = getattr(lm, "named_parameters", None), getattr(lm, "parameters", None)  # PyTorch's, MLX's
    parameters = dict(named()) if named else dict(_named_arrays(nested())) if nested else {}
    if not parameters:
        return ""
    found = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(parameters.items()):
        flat = parameter.reshape(-1)
        some = as_numpy(flat[:: max(1, flat.shape[0] // FINGERPRINT_VALUES)][:FINGERPRINT_VALUES])
        found.update(f"{name} {tuple(parameter.shape)} {some.dtype.name}".encode() + some.tobytes())
    return found.hexdigest()


def _named_arrays(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Arrays of nested dicts and lists with their dotted names."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if children is None:
        yield name, tree
        return
    for key, child in children:
        yield from _named_arrays(child, f"{name}.{key}" if name else str(key))


def state_nbytes(state: Any) -> int:
    """Bytes of the arrays of a state."""
    return sum(leaf.nbytes for _, leaf in leaves(state))
