"""Runs a Core ML export on a Mac and compares its logits with those recorded when it was made.

    pip install 'bmojo-edge[coreml]'                 # macOS 15 or newer
    python apps/coreml/selftest.py DIR               # DIR: what `bmojo-edge export coreml` wrote
    python apps/coreml/selftest.py DIR --units cpu   # or all, gpu (and CPU), ane (and CPU)

Not yet run on Apple hardware. Without it, the driver is tested with a NumPy reading of the package in the place of
Core ML (tests/parity/test_export_coreml.py). SelfTest.swift beside this file does the same in Swift.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ane": "CPU_AND_NE"}


class Driver:
    """One sequence through a package, by its manifest (docs/export.md).

    models: by name of the function, what coremltools.models.MLModel loads; they share one state.
    """

    def __init__(self, manifest: Mapping[str, Any], models: Mapping[str, Any]) -> None:
        self.manifest, self.models = manifest, models
        self.position = 0
        self.wide: dict[str, np.ndarray] = {}  # the part of the state that is float32, given and returned
        self.state = models["decode"].make_state()
        for leaf in manifest["state"]:
            fresh = np.full(leaf["shape"], leaf["fill"])
            if leaf["kind"] == "input":
                self.wide[leaf["name"]] = fresh.astype(np.float32)
            elif leaf["fill"]:  # Core ML makes states of zeros
                self.state.write_state(leaf["name"], fresh)

    def _told(self) -> int:
        """The position as functions take it: it never outgrows int32."""
        base, period = self.manifest["position"]["base"], self.manifest["position"]["period"]
        return self.position if self.position < base else base + (self.position - base) % period

    def _angles(self, size: int) -> dict[str, np.ndarray]:
        """Cosines and sines (1, size, p / 2) of the true position: a product modulo 2^64, the fraction of a turn."""
        if self.manifest["turns"] is None:
            return {}
        turns = np.array([int(turn) for turn in self.manifest["turns"]], np.uint64)
        phase = (self.position + np.arange(size, dtype=np.uint64))[None, :, None] * turns
        angle = phase.view(np.int64).astype(np.float64) * (2 * np.pi / 2.0**64)
        return {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}

    def _call(self, function: str, tokens: np.ndarray | None = None) -> dict[str, np.ndarray]:
        given = {"position": np.array([self._told()], np.int32)} | self._angles(1 if tokens is None else tokens.size)
        if tokens is not None:
            given |= {"tokens": tokens[None].astype(np.int32)} | self.wide
        names = self.manifest["functions"][function]["inputs"]
        return self.models[function].predict({name: given[name] for name in names}, state=self.state)

    def commit(self) -> dict[str, np.ndarray]:
        """Let the tokens that leave the window compete for eidetic slots: choices by output, empty without slots."""
        return self._call("commit") if "commit" in self.manifest["functions"] else {}

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        """Logits (v,) after tokens (1,), or after a whole chunk, which starts where position is a multiple of it."""
        if self.position % self.manifest["chunk"] == 0:
            self.commit()
        found = self._call("decode" if tokens.size == 1 else "prefill", tokens)
        self.wide = {name: found[f"new_{name}"] for name in self.wide}
        self.position += tokens.size
        return found["logits"][0]


class Verdict(NamedTuple):
    """What was measured against the recorded logits."""

    positions: list[int]
    ratios: list[float]  # at each, RMS of the difference over RMS of the recorded logits
    same_top: int  # positions at which the likeliest token is the recorded one
    overall: float  # the ratio over all positions
    bound: float
    seconds: dict[str, float]  # a call, by function

    @property
    def passed(self) -> bool:
        return self.overall < self.bound


def run(folder: Path, models: Mapping[str, Any]) -> Verdict:
    """Feed the recorded tokens, whole chunks where nothing inside one was recorded, and compare."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    recorded = load_file(folder / manifest["self_test"]["file"])
    tokens, positions, wanted = recorded["tokens"], recorded["positions"].tolist(), recorded["logits"]
    driver, chunk, got, times = Driver(manifest, models), manifest["chunk"], [], {"decode": [], "prefill": []}
    while driver.position < len(tokens):
        at = driver.position
        inside = any(at <= p < at + chunk - 1 for p in positions)
        size = chunk if at % chunk == 0 and at + chunk <= len(tokens) and not inside else 1
        start = time.perf_counter()
        logits = driver.feed(tokens[at : at + size])
        times["decode" if size == 1 else "prefill"].append(time.perf_counter() - start)
        if at + size - 1 in positions:
            got.append(logits)
    errors = [_ratio(x, y) for x, y in zip(got, wanted, strict=True)]
    same = sum(int(x.argmax() == y.argmax()) for x, y in zip(got, wanted, strict=True))
    seconds = {name: float(np.median(found)) for name, found in times.items() if found}
    overall = _ratio(np.array(got), wanted)
    return Verdict(positions, errors, same, overall, manifest["self_test"]["bound"], seconds)


def _ratio(got: np.ndarray, wanted: np.ndarray) -> float:
    """RMS of the difference over RMS of what was wanted; infinite where got holds what is no number."""
    found = float(np.sqrt(np.mean((got - wanted) ** 2.0)) / np.sqrt(np.mean(wanted**2.0)))
    return found if np.isfinite(found) else float("inf")


def report(found: Verdict) -> str:
    """The verdict in words."""
    lines = [f"position {at:>8}: RMS ratio {x:.2e}" for at, x in zip(found.positions, found.ratios, strict=True)]
    lines += [f"{name}: {1000 * seconds:.1f} ms a call" for name, seconds in found.seconds.items()]
    lines.append(f"likeliest token as recorded: {found.same_top} of {len(found.positions)}")
    verdict = "PASS" if found.passed else "FAIL"
    return "\n".join([*lines, f"{verdict}: RMS ratio {found.overall:.2e}, bound {found.bound:.0e}"])


def load_models(folder: Path, units: str) -> dict[str, Any]:
    """Every function of the package as coremltools loads it on a Mac."""
    import coremltools as ct  # pyright: ignore[reportMissingImports]

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    where, package = ct.ComputeUnit[UNITS[units]], str(folder / manifest["package"])
    functions = manifest["functions"]
    return {name: ct.models.MLModel(package, compute_units=where, function_name=name) for name in functions}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="what `bmojo-edge export coreml` wrote")
    parser.add_argument("--units", choices=UNITS, default="all", help="where Core ML may run it")
    given = parser.parse_args()
    if sys.platform != "darwin":
        parser.error(
            "Core ML runs on Apple systems only: copy the folder and this file to a Mac with macOS 15 or newer"
        )
    found = run(given.folder, load_models(given.folder, given.units))
    print(report(found))
    return 0 if found.passed else 1


if __name__ == "__main__":
    sys.exit(main())
