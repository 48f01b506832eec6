"""mlxfn exports through `mx.import_function`: the live model's logits and state, the oracle's choices, refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file
from typer.testing import CliRunner

import bmojo_edge as be
from bmojo_convert import to_mlxfn as exporter
from bmojo_convert.export_folder import ExportError
from bmojo_convert.to_mlxfn import to_mlxfn
from bmojo_edge import checkpoint, reference
from bmojo_edge.checkpoint import CheckpointError
from bmojo_edge.cli import app
from bmojo_edge.config import Config, Quantization
from bmojo_edge.mlx import Model, load_weights
from bmojo_edge.mlx.mlxfn_runner import MlxfnModel
from bmojo_edge.state import leaves
from bmojo_metal import use_kernels
from tests.absent import absent
from tests.helpers import GRID, assert_close, odd, random_tokens, random_weights, rms_ratio
from tests.mixers import SSMS, alone, within
from tests.parity.mlx_lm_folders import WIDE, save

CONSTANT = {name: config for name, config in GRID.items() if not config.growing_layers}
MIXERS = {name: alone(name) for name in SSMS} | {f"{kind} within": within(kind) for kind in ("mamba2", "gdn", "gka")}
PACKED = Quantization(group_size=32, bits=4)
MODELS: dict[str, Config] = {
    "bmojo": GRID["all"],
    "windows of 5": GRID["attention, window of 5"],
    "delta within": MIXERS["gdn within"],
    "4 bit": odd(**WIDE, window=8, chunk=3, n_eidetic=5, quantization=PACKED),
    "half": odd(**WIDE, dtype="float16"),
}
STEPS = 310


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """name -> a model folder and its export."""
    made: dict[str, tuple[Path, Path]] = {}

    def export(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("mlxfn") / "model"
            config = {**MODELS, **CONSTANT, **MIXERS}[name]
            if config.vocab_size == WIDE["vocab_size"]:
                save(folder, config)
            else:
                checkpoint.save(folder, config, random_weights(config))
            made[name] = folder, to_mlxfn(folder, folder.with_name("export"))
        return made[name]

    return export


def blocks(chunk: int, steps: int) -> list[int]:
    """Sizes of calls: two chunks at once, single tokens, a prompt that ends within a chunk."""
    sizes: list[int] = []
    while (at := sum(sizes)) < steps:
        sizes.append(min([2 * chunk, 1, 1, chunk + 1, 1][len(sizes) % 5], steps - at))
    return sizes


def compare(folder: Path, export: Path, steps: int, bound: float) -> None:
    """Logits after every call, and the whole state at the end, beside the live model's."""
    live, got = be.load(folder), MlxfnModel.load(export)
    tokens, at = random_tokens(live.config, 1, steps), 0
    ref_state, state = live.init_state(), got.init_state()
    for size in blocks(live.config.chunk_size, steps):
        part = tokens[:, at : at + size]
        at += size
        ref, ref_state = live.prefill(part, ref_state)
        logits, state = got.prefill(part, state)
        assert_close(logits, ref, bound, f"token {at - 1}")
    for (name, ref), (_, leaf) in zip(leaves(ref_state), leaves(state), strict=True):
        assert leaf.dtype == ref.dtype and leaf.shape == ref.shape
        if name.endswith(("position", "positions", "offset")):
            np.testing.assert_array_equal(np.array(leaf), np.array(ref), name)
        elif ref.size:
            assert_close(leaf, ref, bound, name)


@pytest.mark.parametrize(
    "name", [n if n in ("bmojo", "4 bit", "windows of 5") else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_the_live_model_over_every_border(name: str, exported: Any) -> None:
    """310 tokens: the window, the sinks and the fading memory fill up and turn over many times."""
    folder, export = exported(name)
    compare(folder, export, STEPS, 3e-2 if name == "half" else 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONSTANT, *MIXERS])
def test_every_memory_and_mixer(name: str, exported: Any) -> None:
    folder, export = exported(name)
    compare(folder, export, 70, 5e-4 if "gka" in name else 2e-5)


def test_the_oracle_and_its_choices(exported: Any) -> None:
    folder, export = exported("bmojo")
    config, weights = checkpoint.read(folder)
    tokens = random_tokens(config, 1, 100)
    ref, _, memory = reference.forward(config, weights, tokens, return_memory=True)
    model, at = MlxfnModel.load(export), 0
    state = model.init_state()
    for size in blocks(config.chunk_size, 100):
        logits, state = model.prefill(tokens[:, at : at + size], state)
        at += size
        assert_close(logits, ref[:, at - 1], 1e-5)
        for layer, held in enumerate(state.layers):
            chosen = memory.eidetic_index[0, layer, (at - 1) // config.chunk_size]
            np.testing.assert_array_equal(
                np.array(held.eidetic.positions)[0], chosen[np.argsort(chosen < 0, kind="stable")]
            )


def test_positions_run_for_ever(exported: Any) -> None:
    """A sequence whose rotation begins beyond 2^40 gives what one from 0 gives."""
    model = MlxfnModel.load(exported("bmojo")[1])
    tokens = random_tokens(model.config, 1, 40)
    near, _ = model.prefill(tokens, model.init_state())
    far, _ = model.prefill(tokens, model.init_state(offset=2**40 + 12345))
    assert_close(far, near, 1e-4)


def test_a_state_is_a_value(exported: Any) -> None:
    model = MlxfnModel.load(exported("bmojo")[1])
    tokens = random_tokens(model.config, 1, 41)
    _, fork = model.prefill(tokens[:, :20], model.init_state())
    kept = [np.array(x) for _, x in leaves(fork)]
    first, _ = model.prefill(tokens[:, 20:], fork)
    for old, (_, x) in zip(kept, leaves(fork), strict=True):
        np.testing.assert_array_equal(np.array(x), old)
    np.testing.assert_array_equal(np.array(model.prefill(tokens[:, 20:], fork)[0]), np.array(first))
    logits, same = model.decode_one_token(tokens[:, 0], fork, [False])
    assert same is fork and not np.array(logits).any()


def test_manifest(exported: Any) -> None:
    """All a host needs, and weights that are stored once for all functions."""
    folder, export = exported("4 bit")
    found, lm = json.loads((export / "manifest.json").read_text()), be.load(folder)
    assert found["functions"] == {
        "decode": {"tokens": [1, 1], "logits": True},
        "prefill": {"tokens": [1, 3], "logits": True},
        "commit": {"tokens": None, "logits": False},
    }
    assert (found["chunk"], found["eos"], found["device"]) == (3, sorted(lm.tokenizer.eos_ids), "cpu")
    assert (
        found["weights"]
        and found["weights"] != json.loads((exported("bmojo")[1] / "manifest.json").read_text())["weights"]
    )
    state = list(leaves(lm.init_state()))
    assert [x["name"] for x in found["state"]] == [name for name, _ in state]
    for told, (_, leaf) in zip(found["state"], state, strict=True):
        assert tuple(told["shape"]) == leaf.shape and told["dtype"] == str(leaf.dtype).removeprefix("mlx.core.")
        assert (np.array(leaf) == told["fill"]).all()
    parameters: Any = tree_flatten(lm.parameters())
    stored = sum(x.nbytes for _, x in parameters)
    assert stored < (export / "model.mlxfn").stat().st_size < 1.5 * stored + 300_000


def test_generation_from_an_export(exported: Any) -> None:
    folder, export = exported("4 bit")
    told = ["--prompt", "The river runs to the sea", "--max-tokens", "20", "--json"]
    runs = [CliRunner().invoke(app, ["generate", "--model", str(path), *told]) for path in (folder, export)]
    answers = [json.loads(run.stdout) for run in runs]
    assert answers[0]["text"] == answers[1]["text"] != ""


def test_an_export_is_not_served(exported: Any) -> None:
    done = CliRunner().invoke(app, ["serve", str(exported("4 bit")[1])])
    assert done.exit_code == 2 and "an export runs one sequence at a time" in " ".join(done.output.split())


def test_models_without_eidetic_memory_have_no_commit(exported: Any) -> None:
    assert set(MlxfnModel.load(exported("windows of 5")[1]).manifest["functions"]) == {"decode", "prefill"}


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("all", ("add_rms_norm", "memory_attention", "memory_attention_step", "select", "eidetic_slots", "scan")),
        ("attention, window of 5", ("add_rms_norm",)),  # one memory: MLX's own attention does
        ("gdn within", ("memory_attention", "eidetic_slots", "conv")),
    ],
)
def test_kernels_are_written_into_the_file(
    name: str, kernels: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Mac the functions hold kernels. MLX writes them here as well, where nothing can run them."""
    make: Any = mx.fast.metal_kernel

    def on_gpu(**options: Any) -> Any:
        kernel = make(**options)
        return lambda **given: kernel(**given, stream=mx.gpu)

    monkeypatch.setattr(mx.fast, "metal_kernel", on_gpu)
    config, file = {**CONSTANT, **MIXERS}[name], tmp_path / "kernels.mlxfn"
    lm = load_weights(Model(config), random_weights(config))
    with use_kernels(True):
        exporter._write(file, lm, None)
        monkeypatch.setattr(exporter, "exported", nullcontext)
        with pytest.raises(ExportError, match=r"Unable to serialize primitive (CustomTransforms|Contiguous)"):
            exporter._write(tmp_path / "other.mlxfn", lm, None)
    written = file.read_bytes()
    for kernel in kernels:
        assert f"custom_kernel_bmojo_{kernel}_".encode() in written, kernel


# --- refusals ---------------------------------------------------------------------------------------------------------


def small(tmp_path: Path) -> Path:
    config = GRID["mamba"]
    checkpoint.save(tmp_path / "small", config, random_weights(config))
    return tmp_path / "small"


def test_growing_layers_are_refused_by_number(tmp_path: Path) -> None:
    config = GRID["mixed"]
    checkpoint.save(tmp_path / "model", config, random_weights(config))
    done = CliRunner().invoke(app, ["export", "mlxfn", str(tmp_path / "model"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "layer 3: full attention" in done.output and "--window" in done.output
    assert not (tmp_path / "out").exists()


def test_existing_folders_are_not_touched(tmp_path: Path) -> None:
    folder = small(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text('{"format": "another"}')
    for overwrite in (False, True):
        with pytest.raises(ExportError, match="exists"):
            to_mlxfn(folder, tmp_path / "mine", overwrite=overwrite)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["manifest.json"]
    out = to_mlxfn(folder, tmp_path / "out")
    with pytest.raises(ExportError, match="exists; choose another name"):
        to_mlxfn(folder, out)
    (out / "left.over").touch()
    assert not (to_mlxfn(folder, out, overwrite=True) / "left.over").exists()


@pytest.mark.parametrize("damage", ["cut off", "wrong"])
def test_nothing_appears_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    write = exporter._write

    def damaged(path: Path, lm: Any, progress: Any) -> Any:
        if damage == "wrong":
            lm.norm.weight = lm.norm.weight * 1.5
        found = write(path, lm, progress)
        if damage == "wrong":
            lm.norm.weight = lm.norm.weight / 1.5
        else:
            os.truncate(path, path.stat().st_size // 2)
        return found

    monkeypatch.setattr(exporter, "_write", damaged)
    with pytest.raises((ExportError, CheckpointError), match="other logits" if damage == "wrong" else "cannot"):
        to_mlxfn(small(tmp_path), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_damaged_exports_are_named(tmp_path: Path) -> None:
    export = to_mlxfn(small(tmp_path), tmp_path / "out")
    manifest = export / "manifest.json"
    found = json.loads(manifest.read_text())

    def loading(**changes: Any) -> None:
        manifest.write_text(json.dumps({**found, **changes}))
        MlxfnModel.load(export)

    with pytest.raises(CheckpointError, match=r"made with MLX 0\.1\.0, this is"):
        loading(mlx="0.1.0")
    with pytest.raises(CheckpointError, match="version 2"):
        loading(version=2)
    with pytest.raises(CheckpointError, match="was made on a GPU"):
        loading(device="gpu")
    with pytest.raises(CheckpointError, match=r"absent\.mlxfn: file is missing"):
        loading(file="absent.mlxfn")
    with pytest.raises(CheckpointError, match="manifest"):
        loading(config={"vocab_size": 3})
    manifest.unlink()
    with pytest.raises(CheckpointError, match="so this is no export"):
        MlxfnModel.load(export)


def test_one_sequence_at_a_time(exported: Any) -> None:
    model = MlxfnModel.load(exported("bmojo")[1])
    with pytest.raises(ValueError, match="one sequence"):
        model.init_state(2)
    with pytest.raises(ValueError, match=r"shape \(1, t\)"):
        model.prefill([[1], [2]], model.init_state())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bmojo", "4 bit", "windows of 5"])
def test_a_host_in_cpp(name: str, exported: Any, tmp_path: Path) -> None:
    """The manifest is enough for a program in another language."""
    compiler, package = shutil.which("g++"), Path(mx.__file__).parent
    if compiler is None or not (package / "include" / "mlx" / "mlx.h").is_file():
        absent("the C++ host of exports", "needs g++ and MLX's headers")
    host, library = tmp_path / "host", package / "lib"
    flags = ["-std=c++20", "-O1", f"-I{package / 'include'}", f"-L{library}", "-lmlx", f"-Wl,-rpath,{library}"]
    source = Path(__file__).with_name("mlxfn_host.cpp")
    subprocess.run([compiler, str(source), "-o", str(host), *flags], check=True, capture_output=True, timeout=600)
    folder, export = exported(name)
    found, lm = json.loads((export / "manifest.json").read_text()), be.load(folder)
    state = [f"{x['dtype']} {x['fill']} {' '.join(map(str, x['shape']))}\n" for x in found["state"]]
    (tmp_path / "state").write_text("".join(state))
    tokens, chunk, out = random_tokens(lm.config, 1, 40), found["chunk"], tmp_path / "rows.safetensors"
    words = [export / found["file"], chunk, int("commit" in found["functions"]), tmp_path / "state", out, *tokens[0]]
    subprocess.run([str(host), *map(str, words)], check=True, timeout=300)
    rows, ends, at = load_file(out), [], 0
    while at < tokens.shape[1]:
        at += chunk if at % chunk == 0 and at // chunk % 2 == 0 and at + chunk <= 40 else 1
        ends.append(at - 1)
    want = np.array(lm(tokens)[0][0])
    assert len(rows) == len(ends)
    for i, end in enumerate(ends):
        assert rms_ratio(rows[f"row_{i}"][0], want[end]) < 2e-5
