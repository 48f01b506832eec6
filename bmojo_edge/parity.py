"""What a model computes on one machine, kept in one file, so that another machine can be compared with it.

A record holds tokens and, for several ways of feeding them, logits, every layer's output and memories, innovations and
eidetic sets (docs/parity.md). Knows no engine: each hands over its arrays through `Engine`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from bmojo_edge import checkpoint, reference
from bmojo_edge.config import Config, ConfigError
from bmojo_edge.quantize import dequantized
from bmojo_edge.staging import staged_file
from bmojo_edge.state import GROWTH, State, leaves
from bmojo_edge.tensors import Tensors, as_numpy, raw_bytes, write_tensors

FORMAT, VERSION = "bmojo-parity", 2
SLICE = 4096  # values kept of an array of state or activations
LOGITS_SLICE = 65_536
MOST_TOKENS = 4096  # unless more are asked for


class ParityError(ValueError):
    """A record is damaged, of another model or cannot be made; the message names the file."""


# --- engines ----------------------------------------------------------------------------------------------------------


class Pass(NamedTuple):
    """What a call of several tokens gives, in an engine's own arrays or NumPy's."""

    logits: Any  # (1, t, v)
    state: State
    memory: Any  # reference.Memory: scores (1, n_layers, t), eidetic_index (1, n_layers, c, e)
    outputs: Sequence[Any]  # of every layer, (1, t, d)


class Engine(Protocol):
    """A model that can be looked into. `description` says where it runs: engine, version, device, kernels."""

    config: Config
    description: dict[str, str]

    def run(self, tokens: np.ndarray, state: State | None, eidetic_index: np.ndarray | None) -> Pass:
        """Tokens (1, t) after `state`, None = fresh; eidetic_index (1, n_layers, c, e) forces the sets."""
        ...

    def decode(self, token: int, state: State) -> tuple[Any, State]:
        """Logits (1, v) after one token, and the state."""
        ...


class Oracle:
    """The reference as an engine, in float64 on the weights as stored (dequantised where they are quantised)."""

    def __init__(self, folder: Path) -> None:
        config, stored = checkpoint.read(folder)
        self._weights = dequantized(stored, config.quantization)
        self.config = config.replace(quantization=None)
        self.description = {"engine": "reference", "version": np.__version__, "device": "CPU, float64", "kernels": "no"}

    def run(self, tokens: np.ndarray, state: State | None, eidetic_index: np.ndarray | None) -> Pass:
        outputs: list[Any] = []
        logits, after, memory = reference.forward(
            self.config,
            self._weights,
            tokens,
            state,
            eidetic_index=eidetic_index,
            return_memory=True,
            observe=lambda layer, row, begin, out: outputs.append(out[None]),
        )
        return Pass(logits, after, memory, outputs)

    def decode(self, token: int, state: State) -> tuple[Any, State]:
        logits, state = reference.forward(self.config, self._weights, [[token]], state)
        return logits[:, 0], state


# --- tokens and the ways to feed them ---------------------------------------------------------------------------------


def tokens_for(vocab_size: int, n: int) -> np.ndarray:
    """n token ids (n,) int64 that look random and are the same everywhere (splitmix64)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z % np.uint64(vocab_size)).astype(np.int64)


def borders(config: Config) -> dict[str, int]:
    """Lengths at which a memory begins to be used or to overflow, by its name."""
    w, f, c = config.window, config.n_fading, config.chunk_size
    found: dict[str, int] = {}
    if "bmojo" in config.layer_types:
        found |= {"chunk": c, "window": w}
        found |= {"fading memory": w + f} if f else {}
        found |= {"sinks": w + config.n_sinks} if config.n_sinks else {}
        found |= {"eidetic memory": w + c + config.n_sinks + config.n_eidetic} if config.n_eidetic else {}
    for layer, kind in enumerate(config.layer_types):
        if kind == "attention":
            reach = config.attention_window_of(layer)
            found |= {f"attention window of {reach:,}": reach} if reach else {"growing cache": GROWTH}
    return dict(sorted(found.items(), key=lambda border: border[1]))


def default_tokens(config: Config) -> int:
    """A length that crosses every border of the memories by more than a chunk, 4,096 at most."""
    return min(MOST_TOKENS, max(borders(config).values(), default=64) + 2 * config.chunk_size + 3)


def pieces(config: Config, n: int) -> dict[str, list[int]]:
    """Ways to feed n tokens: lengths of the calls by the name of the way; in `decode` calls of 1 are decoding steps."""
    ends = {1, n} | {end + step for end in borders(config).values() for step in (-1, 0, 1)}
    cuts = [0, *sorted(end for end in ends if 1 <= end <= n)]
    last = min(n - 1, config.chunk_size + 3)
    ways = {"whole": [n], "pieces": np.diff(cuts).tolist()}
    return ways | ({"decode": [n - last, *[1] * last]} if last else {})


# --- observing --------------------------------------------------------------------------------------------------------


@dataclass
class Observation:
    """What was seen: `values` by name, sampled; sets and innovations as they are.

    decoded: sets that decoding steps chose which differ from the given ones, as (layer, chunk, positions).
    """

    values: dict[str, np.ndarray]
    scores: np.ndarray  # (n_layers, n) float32, with the sets forced
    decoded: list[tuple[int, int, np.ndarray]] = field(default_factory=list)


def sampled(array: np.ndarray, limit: int) -> np.ndarray:
    """Values (m,) of an array, all or `limit` of them spread without a period, float32 or int64."""
    flat = array.reshape(-1)
    if len(flat) > limit:
        places = np.arange(limit, dtype=np.float64) * ((5**0.5 - 1) / 2) % 1.0
        flat = flat[np.unique((places * len(flat)).astype(np.int64))]
    return flat.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float32)


def _wide(array: Any) -> np.ndarray:
    array = as_numpy(array)
    return array if np.issubdtype(array.dtype, np.integer) else array.astype(np.float64)


def _keep(values: dict[str, np.ndarray], name: str, array: Any, limit: int = SLICE) -> None:
    """A sample of an array, and the RMS of all of it."""
    array = _wide(array)
    values[name] = sampled(array, limit)
    if array.dtype == np.float64:
        values[f"{name}#rms"] = np.array([np.sqrt(np.mean(array**2)) if array.size else 0.0], np.float32)


def choose(engine: Engine, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sets (n_layers, c, e) int64 an engine chooses by itself, and the innovations (n_layers, n) it chose by."""
    memory = engine.run(tokens[None], None, None).memory
    return as_numpy(memory.eidetic_index)[0].astype(np.int64), as_numpy(memory.scores)[0].astype(np.float32)


def observe(engine: Engine, tokens: np.ndarray, sets: np.ndarray) -> Observation:
    """Feed tokens (n,) in every way with the sets (n_layers, c, e) given; ValueError where one cannot be kept."""
    seen = Observation({}, np.zeros((0, 0), np.float32))
    for way, lengths in pieces(engine.config, len(tokens)).items():
        state, at = None, 0
        for length in lengths:
            end = at + length
            if way == "decode" and state is not None:
                logits, state = _decode(engine, tokens, at, state, sets, seen)
                outputs = []
            else:
                logits, state, memory, outputs = engine.run(tokens[None, at:end], state, _forced(engine, sets, at, end))
                if way == "whole":
                    seen.scores = as_numpy(memory.scores)[0].astype(np.float32)
            name = f"{way}.{end}"
            _keep(seen.values, f"{name}.logits", logits, LOGITS_SLICE)
            for i, out in enumerate(outputs):
                _keep(seen.values, f"{name}.layers.{i}.output", out)
            if way != "decode" or end in (lengths[0], len(tokens)):
                for leaf, array in leaves(state):
                    _keep(seen.values, f"{name}.{leaf}", array)
            at = end
    return seen


def _forced(engine: Engine, sets: np.ndarray, begin: int, end: int) -> np.ndarray | None:
    """The sets of the chunks that tokens begin .. end - 1 are in."""
    c = engine.config.chunk_size
    return sets[None, :, begin // c : (end - 1) // c + 1] if sets.size else None


def _decode(
    engine: Engine, tokens: np.ndarray, at: int, state: State, sets: np.ndarray, seen: Observation
) -> tuple[Any, State]:
    """One decoding step; where it chooses another set than the given one, that is noted, and the given one is taken."""
    logits, after = engine.decode(int(tokens[at]), state)
    chunk, within = divmod(at, engine.config.chunk_size)
    if within or not sets.size:
        return logits, after
    differ = False
    for i, layer in enumerate(after.layers):
        if getattr(layer, "eidetic", ()) != ():
            own = as_numpy(layer.eidetic.positions)[0]
            if not np.array_equal(own, sets[i, chunk]):
                seen.decoded.append((i, chunk, own))
                differ = True
    if differ:
        again = engine.run(tokens[None, at : at + 1], state, _forced(engine, sets, at, at + 1))
        logits, after = as_numpy(again.logits)[:, 0], again.state
    return logits, after


# --- records ----------------------------------------------------------------------------------------------------------


def identity(config: Config, weights: Tensors) -> str:
    """The sha256 of a config and of all weights as stored; how they are cut into files does not matter."""
    whole = hashlib.sha256(config.to_json().encode())
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        whole.update(f"{name} {array.dtype.name} {array.shape}".encode())
        whole.update(array.reshape(-1).view(np.uint8).data)
    return whole.hexdigest()


@dataclass(frozen=True)
class Record:
    """What one machine computed of tokens (n,): the sets it chose (n_layers, c, e), by which scores, and all values."""

    model: str  # the name of its folder
    identity: str
    config: Config
    engine: dict[str, str]
    tokens: np.ndarray
    sets: np.ndarray
    scores: np.ndarray  # (n_layers, n) float32
    values: Mapping[str, np.ndarray]

    def save(self, path: Path) -> None:
        """Write the file under another name, then rename it."""
        about = {"model": self.model, "identity": self.identity, "engine": self.engine, "config": self.config.to_dict()}
        tensors = {"tokens": self.tokens, "sets": self.sets, "scores": self.scores}
        tensors |= {f"values/{name}": array for name, array in self.values.items()}
        metadata = {"format": FORMAT, "version": str(VERSION), "about": json.dumps(about)}
        metadata["checksum"] = checksum(metadata["about"], tensors)
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(path) as file:
            write_tensors(file, tensors, metadata)

    @classmethod
    def open(cls, path: Path) -> Record:
        """Read a file. Raises ParityError naming it and what is missing, damaged or of another version."""
        if not path.is_file():
            raise ParityError(f"{path}: no such file; make it with `bmojo-edge parity record`")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError) as error:
            raise ParityError(f"{path}: truncated or damaged ({error})") from None
        if metadata.get("format") != FORMAT:
            raise ParityError(f"{path}: is no parity record")
        if metadata.get("version") != str(VERSION):
            raise ParityError(
                f"{path}: version {metadata.get('version')} of the format, this program reads version {VERSION}; "
                "record it again"
            )
        try:
            about = json.loads(metadata["about"])
            config = Config.from_json(about["config"])
            model, whole, engine = str(about["model"]), str(about["identity"]), dict(about["engine"])
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise ParityError(f"{path}: damaged: what it says of its model cannot be read ({error})") from None
        if metadata.get("checksum") != checksum(metadata["about"], tensors):
            raise ParityError(f"{path}: damaged or edited: it does not hold what was recorded")
        head = {name: tensors.pop(name, None) for name in ("tokens", "sets", "scores")}
        _check_shapes(path, config, head)
        values = {name.removeprefix("values/"): array for name, array in tensors.items()}
        return cls(model, whole, config, engine, head["tokens"], head["sets"], head["scores"], values)


def checksum(about: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Of a record's description and of names, dtypes, shapes and bytes of its tensors."""
    whole = hashlib.sha256(about.encode())
    for name, array in sorted(tensors.items()):
        whole.update(f"{name} {array.dtype.name} {array.shape}".encode() + raw_bytes(array))
    return whole.hexdigest()


def _check_shapes(path: Path, config: Config, head: Mapping[str, np.ndarray | None]) -> None:
    tokens, n_layers = head["tokens"], len(config.layer_types)
    n = 0 if tokens is None else len(tokens)
    wanted = {
        "tokens": ("int64", (n,)),
        "sets": ("int64", (n_layers, -(-n // config.chunk_size), config.n_eidetic)),
        "scores": ("float32", (n_layers, n)),
    }
    for name, (dtype, shape) in wanted.items():
        array = head[name]
        if array is None:
            raise ParityError(f"{path}: damaged: {name} is missing")
        if array.dtype != dtype or array.shape != shape or not n:
            raise ParityError(f"{path}: damaged: {name} is {array.dtype} {array.shape}, expected {dtype} {shape}")
    assert tokens is not None
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ParityError(f"{path}: damaged: tokens are outside the vocabulary of {config.vocab_size}")


def record(folder: Path, engine: Engine, n: int | None = None) -> Record:
    """What an engine that holds the model of a folder computes for n tokens, None = enough to cross every border."""
    config, weights = checkpoint.read(folder)
    if n is not None and n < 1:
        raise ParityError(f"--tokens: must be at least 1, got {n}")
    tokens = tokens_for(config.vocab_size, n or default_tokens(config))
    sets, _ = choose(engine, tokens)
    seen = observe(engine, tokens, sets)
    name = folder.resolve().name
    return Record(name, identity(config, weights), config, engine.description, tokens, sets, seen.scores, seen.values)
