"""golden.safetensors: a few tokens and the logits a model must give for them, kept beside its weights.

Whoever makes the file states who computed the logits; whoever loads the model may compare. Knows no engine: logits
come as arrays, or from the oracle on weights read one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from bmojo_edge.config import Config
from bmojo_edge.tensors import CheckpointError, as_numpy

FILE = "golden.safetensors"
N_TOKENS = 16
_ROWS = 16384  # of the head at once

# RMS error of the logits over their RMS that rounding explains: of the weights alone, of quantised weights, and of an
# engine that computes in that dtype (a GPU may multiply float32 in TF32). docs/checkpoints.md has what was measured.
_WEIGHTS = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
_QUANTIZED = {8: 0.1, 4: 0.8}
_ENGINE = {"float32": 5e-3, "float16": 2e-2, "bfloat16": 1e-1}


class Golden(NamedTuple):
    """Tokens (n,) int64, their logits (n, v) float32 and who computed them, before weights were rounded.

    quantized_logits: what the oracle computes from the quantised weights, where they are; close enough to compare with.
    """

    tokens: np.ndarray
    logits: np.ndarray
    author: str
    quantized_logits: np.ndarray | None = None


def tokens_for(vocab_size: int) -> np.ndarray:
    """The token ids used, (16,) int64: spread over the vocabulary, the same for every model of one size."""
    return np.arange(1, N_TOKENS + 1, dtype=np.int64) * 2_654_435_761 % vocab_size


def write(folder: Path, golden: Golden) -> None:
    """Write the file into a model folder."""
    tensors = {"tokens": golden.tokens.astype(np.int64), "logits": golden.logits.astype(np.float32)}
    if golden.quantized_logits is not None:
        tensors["quantized_logits"] = golden.quantized_logits.astype(np.float32)
    (folder / FILE).write_bytes(to_bytes(tensors, metadata={"author": golden.author, "format": "pt"}))


def read(folder: str | Path) -> Golden | None:
    """The golden tokens and logits of a model folder, None where it has none."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            tokens, logits = file.get_tensor("tokens"), file.get_tensor("logits")
            quantized = file.get_tensor("quantized_logits") if "quantized_logits" in file.keys() else None  # noqa: SIM118
            author = (file.metadata() or {}).get("author", "unknown")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    for array in (logits, logits if quantized is None else quantized):
        if tokens.ndim != 1 or array.ndim != 2 or len(tokens) != len(array) or not len(tokens):
            raise CheckpointError(f"{path}: tokens {tokens.shape} and logits {array.shape} do not go together")
    return Golden(tokens, logits, author, quantized)


def rms_ratio(got: np.ndarray, ref: np.ndarray) -> float:
    """RMS of the difference over RMS of the reference, in float64; NaN where anything is not finite."""
    got, ref = np.asarray(got, np.float64), np.asarray(ref, np.float64)
    if not (np.isfinite(got).all() and np.isfinite(ref).all()):
        return float("nan")
    scale = float(np.sqrt(np.mean(ref**2)))
    return float(np.sqrt(np.mean((got - ref) ** 2))) / max(scale, 1e-30)


def conversion_bound(config: Config) -> float:
    """The largest `rms_ratio` that rounding weights to the model's dtype, and its quantisation, explains."""
    explained = _WEIGHTS[config.dtype]
    return max(explained, _QUANTIZED[config.quantization.bits]) if config.quantization else explained


def compare(logits: np.ndarray, expected: np.ndarray, limit: float, what: str, author: str) -> float:
    """The `rms_ratio` of logits (n, v) to the expected; CheckpointError naming `what` where it exceeds `limit`."""
    if logits.shape != expected.shape:
        raise CheckpointError(f"{what}: golden logits have shape {expected.shape}, the model's {logits.shape}")
    ratio = rms_ratio(logits, expected)
    if not ratio <= limit:  # also NaN
        raise CheckpointError(
            f"{what}: logits differ from those of {author} (RMS ratio {ratio:.3g}, rounding explains {limit:.3g}); "
            "the weights are damaged or were converted wrongly"
        )
    return ratio


def check(folder: str | Path, config: Config, logits_of: Callable[[np.ndarray], Any]) -> float | None:
    """Compare an engine's logits with the folder's golden ones; None where the folder has none.

    logits_of maps tokens (1, n) int64 to logits (1, n, v) or (n, v), arrays of any engine, from a fresh state. config
    is the loaded model's, whose dtype sets how much rounding is allowed. Returns the RMS ratio, raises CheckpointError
    where it is too large.
    """
    golden, path = read(folder), str(Path(folder) / FILE)
    if golden is None:
        return None
    if golden.tokens.min() < 0 or golden.tokens.max() >= config.vocab_size:
        raise CheckpointError(f"{path}: tokens are outside the vocabulary of {config.vocab_size}")
    logits = as_numpy(logits_of(golden.tokens[None])).astype(np.float32)
    expected, limit = golden.logits, _ENGINE[config.dtype]
    if golden.quantized_logits is not None:
        expected = golden.quantized_logits
    elif config.quantization is not None:
        limit = max(limit, _QUANTIZED.get(config.quantization.bits, 0.8))
    return compare(logits.reshape(logits.shape[-2:]), expected, limit, path, golden.author)


class _Body(Mapping[str, np.ndarray]):
    """Weights with the embedding's rows in use alone and the identity for a head: the logits are the last states."""

    def __init__(self, weights: Mapping[str, np.ndarray], embed: np.ndarray) -> None:
        self._weights = weights
        self._own = {"embed.weight": embed, "lm_head.weight": np.eye(embed.shape[1], dtype=np.float32)}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._own[name] if name in self._own else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter({*self._weights, *self._own})

    def __len__(self) -> int:
        return len({*self._weights, *self._own})


def oracle_logits(config: Config, weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits (n, v) of tokens (n,) by the oracle in float32, on plain (dequantised) weights.

    One layer is in memory at a time: a vocabulary can be as large as many layers, so the oracle runs on the rows in use
    and the head is applied afterwards, part by part.
    """
    from bmojo_edge import reference

    used, ids = np.unique(tokens, return_inverse=True)
    body = _Body(weights, weights["embed.weight"][used].astype(np.float32))
    narrow = config.replace(vocab_size=config.d_model, tie_embeddings=False, quantization=None)
    states, _ = reference.forward(narrow, body, ids[None], dtype=np.float32)  # (1, n, d)
    head = weights["embed.weight" if config.tie_embeddings else "lm_head.weight"]
    parts = [states[0] @ head[i : i + _ROWS].astype(np.float32).T for i in range(0, len(head), _ROWS)]
    return np.concatenate(parts, axis=1)
