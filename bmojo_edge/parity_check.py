"""A record from one machine against what another computes: errors by layer and memory, and the choices of each.

Numbers are compared with the record's eidetic sets forced; the sets are compared on their own (docs/model.md section
6): rounding may swap tokens whose innovations it cannot tell apart, and nothing else may differ.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bmojo_edge import checkpoint
from bmojo_edge.config import Config
from bmojo_edge.parity import Engine, Observation, ParityError, Record, choose, identity, observe
from bmojo_edge.reference_memory import top_positions

# RMS of the difference over RMS of the record that rounding explains; docs/parity.md has what was measured.
BOUNDS = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}

# The columns of the table. A layer's own state is `ssm` in a Mamba-like layer and `cache` in an attention layer.
MEMORIES = ("output", "window", "fading", "sinks", "eidetic", "history", "ssm", "cache", "innovation")


def tie(dtype: str) -> float:
    """How far apart, relative to the last one kept, innovations may be for rounding to swap them."""
    eps = float(ml_dtypes.finfo(dtype).eps)
    return max(4 * eps, BOUNDS["float32"]) if dtype == "float32" else 4 * eps


@dataclass
class Layer:
    """Errors of one layer: memory -> the largest RMS ratio; chunks whose sets swap ties; sentences on wrong sets."""

    index: int
    kind: str
    errors: dict[str, float] = field(default_factory=dict)
    swapped: int = 0
    wrong_sets: list[str] = field(default_factory=list)

    def note(self, memory: str, error: float) -> None:
        """Keep the larger error; one that is no number is the largest."""
        error = math.inf if math.isnan(error) else error
        self.errors[memory] = max(error, self.errors.get(memory, 0.0))


@dataclass
class Comparison:
    """The outcome of a check."""

    record: Record
    engine: dict[str, str]
    dtype: str
    bound: float
    layers: list[Layer]
    logits: float
    position: bool  # whether positions agree
    chunks: int  # chosen sets of each layer

    @property
    def failures(self) -> list[str]:
        """What is beyond its bound, a sentence each, the first layer first."""
        found = []
        for layer in self.layers:
            beyond = {name: error for name, error in layer.errors.items() if not error <= self.bound}
            if beyond:
                shown = ", ".join(f"{name} {error:.1e}" for name, error in beyond.items())
                found.append(f"layer {layer.index} ({layer.kind}): {shown}; the bound is {self.bound:.1e}")
            found += layer.wrong_sets
        if not self.logits <= self.bound:
            found.append(f"logits: {self.logits:.1e}; the bound is {self.bound:.1e}")
        if not self.position:
            found.append("state: positions differ")
        return found

    def as_json(self) -> dict[str, Any]:
        """The comparison as plain values; an error that is no number is null."""

        def number(x: float) -> float | None:
            return x if math.isfinite(x) else None

        return {
            "ok": not self.failures,
            "failures": self.failures,
            "model": self.record.model,
            "dtype": self.dtype,
            "bound": self.bound,
            "tokens": len(self.record.tokens),
            "recorded_on": self.record.engine,
            "checked_on": self.engine,
            "logits": number(self.logits),
            "layers": [
                {
                    "layer": layer.index,
                    "type": layer.kind,
                    "errors": {name: number(error) for name, error in layer.errors.items()},
                    "swapped_sets": layer.swapped,
                    "wrong_sets": layer.wrong_sets,
                }
                for layer in self.layers
            ],
        }


class Error:
    """The RMS of differences over the RMS of the record, of any number of arrays together.

    Integers must be equal, shapes and dtypes too, and a record of zeros demands zeros.
    """

    def __init__(self) -> None:
        self._difference, self._reference = 0.0, 0.0

    def add(self, got: np.ndarray, ref: np.ndarray) -> None:
        """Take in one array and what the record has in its place."""
        if got.shape != ref.shape or got.dtype != ref.dtype:
            self._difference = math.inf
        elif np.issubdtype(ref.dtype, np.integer):
            self._difference += 0.0 if np.array_equal(got, ref) else math.inf
        else:
            got, ref = got.astype(np.float64), ref.astype(np.float64)
            self._difference += float(((got - ref) ** 2).sum())
            self._reference += float((ref**2).sum())

    @property
    def ratio(self) -> float:
        """Infinite where something is no number."""
        if not (math.isfinite(self._difference) and math.isfinite(self._reference)):
            return math.inf
        if not self._difference:
            return 0.0
        return math.sqrt(self._difference / self._reference) if self._reference else math.inf


def check(folder: Path, record: Record, engine: Engine, bound: float | None = None) -> Comparison:
    """Compute here, with an engine that holds the model of a folder, what a record holds, and compare.

    bound: the largest error allowed, None: that of the model's dtype.

    Raises ParityError where the record is of another model, or is none that its engine can have made.
    """
    config, weights = checkpoint.read(folder)
    own = identity(config, weights)
    if own != record.identity:
        raise ParityError(
            f"the record is of another model: {record.model} ({record.identity[:12]}), "
            f"{folder} holds {folder.resolve().name} ({own[:12]})"
        )
    layers = [Layer(i, kind) for i, kind in enumerate(config.layer_types)]
    strict = tie("float32")
    for problem in wrong_sets(config, record.sets, record.scores, record.scores, strict)[1]:
        raise ParityError(f"the record's sets are not those that its own innovations give: {problem}")
    for problem in wrong_sets(config, *_swap(choose(engine, record.tokens)), strict)[1]:
        layer = int(problem.split()[1].rstrip(","))
        layers[layer].wrong_sets.append(f"{problem}: this machine does not choose by its own innovations")
    try:
        seen = observe(engine, record.tokens, record.sets)
    except ValueError as error:
        raise ParityError(f"the record's sets cannot be kept here: {error}") from None
    missing = sorted(record.values.keys() ^ seen.values.keys())
    if missing:
        raise ParityError(f"the record is damaged or of another version: {missing[0]} is not in both")
    return _compare(config, record, engine, seen, layers, BOUNDS[config.dtype] if bound is None else bound)


def _swap(chosen: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sets, scores = chosen
    return sets, scores, scores


def _compare(
    config: Config, record: Record, engine: Engine, seen: Observation, layers: list[Layer], bound: float
) -> Comparison:
    errors: dict[tuple[str, str], Error] = {}
    for name, ref in record.values.items():
        way, _, what = name.split(".", 2)
        pair = seen.values[name], ref
        errors.setdefault((way, what), Error()).add(*(map(_roots, pair) if what.endswith(".scores") else pair))
    logits, position = 0.0, True
    for (_, what), error in errors.items():
        where = re.match(r"layers\.(\d+)\.([A-Za-z]+)", what)
        if where:
            layer = layers[int(where[1])]
            layer.note(_memory(layer.kind, where[2]), error.ratio)
        elif what.startswith("logits"):
            logits = max(logits, error.ratio)
        else:
            position = position and error.ratio == 0
    for layer in layers:
        own, ref = seen.scores[layer.index], record.scores[layer.index]
        if own.any() or ref.any():
            error = Error()
            error.add(_roots(own), _roots(ref))
            layer.note("innovation", error.ratio)
    allowed = tie(config.dtype)
    swapped, problems = wrong_sets(config, record.sets, record.scores, seen.scores, allowed)
    for i, chunk, positions in seen.decoded:
        swapped[i] += 1
        problem = _difference(i, chunk, record.sets[i, chunk], positions, record.scores[i], allowed)
        problems += [f"{problem} (in decoding)"] if problem else []
    for layer in layers:
        layer.swapped = swapped[layer.index]
        layer.wrong_sets += [p for p in problems if p.startswith(f"layer {layer.index},")]
    return Comparison(record, engine.description, config.dtype, bound, layers, logits, position, record.sets.shape[1])


def _roots(scores: np.ndarray) -> np.ndarray:
    """Innovations are squares: their roots carry the rounding of the signal as other numbers do, not twice over."""
    return np.sqrt(scores)


def _memory(kind: str, leaf: str) -> str:
    """The column of a leaf of the state."""
    if leaf in MEMORIES:
        return leaf
    return "cache" if kind == "attention" else "ssm"


# --- sets -------------------------------------------------------------------------------------------------------------


def wrong_sets(
    config: Config, sets: np.ndarray, scores: np.ndarray, others: np.ndarray, allowed: float
) -> tuple[list[int], list[str]]:
    """Sets (n_layers, c, e), chosen by `scores` (n_layers, n), against those that `others` (n_layers, n) give.

    Returns how many sets of each layer differ, and a sentence for each that differs by more than ties.
    """
    swapped, problems = [0] * len(sets), []
    n = scores.shape[1]
    for i in range(len(sets)):
        if not config.n_eidetic or config.layer_types[i] != "bmojo":
            continue
        for chunk in range(sets.shape[1]):
            end = (chunk + 1) * config.chunk_size - config.window
            eligible = np.arange(config.n_sinks, max(config.n_sinks, min(end, n)))
            own = eligible[top_positions(others[i][eligible], eligible, config.n_eidetic)]
            given = sets[i, chunk][sets[i, chunk] >= 0]
            if np.array_equal(own, given):
                continue
            swapped[i] += 1
            if not np.isin(given, eligible).all() or len(given) != len(own) or len(np.unique(given)) != len(given):
                problems.append(f"layer {i}, chunk {chunk}: the set holds what it cannot")
                continue
            problem = _difference(i, chunk, given, own, scores[i], allowed)
            problems += [problem] if problem else []
    return swapped, problems


def _difference(
    layer: int, chunk: int, given: np.ndarray, own: np.ndarray, scores: np.ndarray, allowed: float
) -> str | None:
    """What is wrong with a set that differs from the given one; None where the tokens swapped are ties."""
    given, own = given[given >= 0], own[own >= 0]
    if len(given) != len(own):
        return f"layer {layer}, chunk {chunk}: {len(own)} tokens are kept here, {len(given)} in the record"
    last = float(scores[given].min(initial=np.inf))
    for j in np.setxor1d(given, own):
        gap = abs(float(scores[j]) - last) / max(abs(last), 1e-30)
        if not gap <= allowed:
            return (
                f"layer {layer}, chunk {chunk}: position {j} is in one set only, and its innovation is {gap:.1e} "
                f"from the last one kept; rounding explains {allowed:.1e}"
            )
    return None
