"""Core ML exports, run by our own reading of MIL (mil.py): the oracle's logits and choices, one state for all."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.absent import absent

try:
    import coremltools  # noqa: F401  # pyright: ignore[reportMissingImports]
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    absent("Core ML exports", f"{error.name} is not installed", expected=False)

from bmojo_convert import to_coreml as exporter
from bmojo_convert.export_folder import ExportError
from bmojo_convert.step import angles
from bmojo_convert.to_coreml import to_coreml
from bmojo_edge import checkpoint, reference
from bmojo_edge.cli import app
from bmojo_edge.config import Config
from tests.helpers import assert_close, odd, random_tokens, random_weights, rms_ratio
from tests.parity.mil import Package

pytestmark = pytest.mark.filterwarnings("ignore")  # the converter's own

MODELS: dict[str, Config] = {
    "bmojo": odd("bmojo", n_fading=8, tie_embeddings=True),
    "mamba": odd("mamba", rope_theta=None),
    "windowed attention": odd("attention", ssm=None, attention_window=7, n_eidetic=0),
}
STEPS = 300


class Host:
    """Drives a package by its manifest, as a program on a phone would."""

    def __init__(self, folder: Path, states: str = "float16") -> None:
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        self.package = Package(folder / self.manifest["package"], states)
        dtype = np.float16 if states == "float16" else np.float32
        leaves = self.manifest["state"]
        self.states = {x["name"]: np.full(x["shape"], x["fill"], dtype) for x in leaves if x["kind"] == "state"}
        self.wide = {x["name"]: np.full(x["shape"], x["fill"], x["dtype"]) for x in leaves if x["kind"] == "input"}
        self.position, self.held = 0, {}

    def _call(self, function: str, size: int, tokens: Any = None) -> dict[str, Any]:
        base, period = self.manifest["position"]["base"], self.manifest["position"]["period"]
        p = self.position if self.position < base else base + (self.position - base) % period
        given: dict[str, Any] = {"position": np.array([p], np.int32)}
        if self.manifest["turns"] is not None:
            turns = np.array([int(x) for x in self.manifest["turns"]], np.uint64)
            cos, sin = angles(turns, self.position + np.arange(size)[None])
            given |= {"cos": cos, "sin": sin}
        if tokens is not None:
            given["tokens"] = tokens.astype(np.int32)
        given |= self.wide
        names = self.manifest["functions"][function]["inputs"]
        found = self.package.run(function, {name: given[name] for name in names}, self.states)
        assert list(found) == self.manifest["functions"][function]["outputs"]
        return found

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        """Logits (1, v) after tokens (1, 1) or (1, chunk)."""
        if "commit" in self.manifest["functions"] and self.position % self.manifest["chunk"] == 0:
            self._choose(self._call("commit", 1))
        found = self._call("decode" if tokens.shape[1] == 1 else "prefill", tokens.shape[1], tokens)
        self.wide = {name: found[f"new_{name}"] for name in self.wide}
        self.position += tokens.shape[1]
        return found["logits"]

    def _choose(self, found: dict[str, Any]) -> None:
        config = self.manifest["config"]
        leaving = self.position - config["window"] + np.arange(self.manifest["chunk"])
        for name, choice in found.items():
            layer = int(name.removeprefix("choice_"))
            slots = np.concatenate([self.held.get(layer, np.full(choice.shape[1], -1)), leaving])
            self.held[layer] = np.where(choice[0] < 0, -1, slots[np.maximum(choice[0], 0)])


def half(config: Config) -> dict[str, np.ndarray]:
    """Random weights that half precision holds exactly, so that their rounding is no part of the comparison."""
    return {name: x.astype(np.float16).astype(np.float32) for name, x in random_weights(config).items()}


def exported(tmp: Path, config: Config, weights: str) -> Path:
    checkpoint.save(tmp / "model", config, half(config))
    return to_coreml(tmp / "model", tmp / weights, weights=weights)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The export of a model by its name and its weights' type, made when first asked for."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, weights: str) -> Path:
        if (name, weights) not in made:
            made[name, weights] = exported(tmp_path_factory.mktemp("coreml"), MODELS[name], weights)
        return made[name, weights]

    return get


def compared(folder: Path, config: Config, states: str) -> tuple[np.ndarray, np.ndarray, float]:
    """(logits by the package, by the oracle, share of equal eidetic choices); chunks and single tokens take turns."""
    tokens = random_tokens(config, 1, STEPS)
    ref, _, memory = reference.forward(config, half(config), tokens, return_memory=True)
    host, chunk, at = Host(folder, states), config.chunk_size, 0
    got, want, same = [], [], []
    while at < STEPS:
        size = chunk if at % chunk == 0 and at // chunk % 2 else 1
        got.append(host.feed(tokens[:, at : at + size])[0])
        at += size
        want.append(ref[0, at - 1])
        same += [np.array_equal(x, memory.eidetic_index[0, i, (at - 1) // chunk]) for i, x in host.held.items()]
    assert bool(same) == bool("bmojo" in config.layer_types and config.n_eidetic)
    return np.array(got), np.array(want), float(np.mean(same)) if same else 1.0


@pytest.mark.parametrize("name", MODELS)
def test_the_program_is_the_oracle(name: str, packages: Any) -> None:
    """Arithmetic in float32, states unrounded: 300 tokens, every one below the bound, every choice the oracle's."""
    got, want, same = compared(packages(name, "float32"), MODELS[name], "float32")
    for at, (x, y) in enumerate(zip(got, want, strict=True)):
        assert_close(x, y, 1e-4, f"{name}, call {at}")
    assert same == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_half_precision(name: str, packages: Any) -> None:
    got, want, same = compared(packages(name, "float16"), MODELS[name], "float16")
    assert_close(got, want, 2e-2, name)
    assert same > 0.9


def test_functions_share_states_and_weights(packages: Any) -> None:
    """All functions have all states, half precision and aligned; what a bmojo layer carries wide is an input."""
    folder = packages("bmojo", "float32")
    host = Host(folder)
    shapes = {x["name"]: tuple(x["shape"]) for x in host.manifest["state"] if x["kind"] == "state"}
    assert shapes and all(shape[-1] % 32 == 0 for shape in shapes.values())
    for function, described in host.manifest["functions"].items():
        assert host.package.states(function) == shapes
        assert host.package.inputs(function) == {*described["inputs"]}
    assert set(host.wide) == {"layers_0_ssm_ssm"}
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.mlpackage", "manifest.json", "self_test.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4", "palettized4"])
def test_fewer_bits(weights: str, tmp_path: Path) -> None:
    """Widths that blocks divide: the package holds compressed matrices and stays near the oracle.

    Without eidetic slots: other weights make other choices, which are right for them and far from the oracle's.
    """
    config = odd("bmojo", d_model=64, d_ff=96, head_dim=32, vocab_size=64, n_eidetic=0, tie_embeddings=True)
    folder = exported(tmp_path, config, weights)
    got, want, _ = compared(folder, config, "float16")
    assert rms_ratio(got, want) < {"int8": 0.1, "int4": 0.3, "palettized4": 0.3}[weights]  # random weights
    kinds = Host(folder).package.operations("decode")
    assert ("constexpr_lut_to_dense" if weights == "palettized4" else "constexpr_blockwise_shift_scale") in kinds


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_full_attention_is_refused_by_layer(tmp_path: Path) -> None:
    config = odd("attention", "attention", ssm=None, attention_window=(7, None), n_eidetic=0)
    checkpoint.save(tmp_path / "model", config, random_weights(config))
    with pytest.raises(ExportError, match="layer 1: full attention"):
        to_coreml(tmp_path / "model", tmp_path / "out")
    with pytest.raises(ExportError, match="weights: must be one of float32, float16"):
        to_coreml(tmp_path / "model", tmp_path / "out", weights="int2")
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing(packages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = packages("mamba", "float32").with_name("model")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model.mlpackage")

    monkeypatch.setattr(exporter, "_join", full)
    with pytest.raises(OSError, match="No space left"):
        to_coreml(source, tmp_path / "out", weights="float32")
    assert not list(tmp_path.iterdir())


def test_command(packages: Any, tmp_path: Path) -> None:
    source = packages("mamba", "float32").with_name("model")
    run = CliRunner().invoke(app, ["export", "coreml", str(source), "--out", str(tmp_path / "out"), "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert "manifest.json" in found["files"] and any("weight.bin" in name for name in found["files"])
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["weights"] == "float16"
    again = CliRunner().invoke(app, ["export", "coreml", str(source), "--out", str(tmp_path / "out")])
    assert again.exit_code == 1 and "exists; choose another name" in again.stderr
