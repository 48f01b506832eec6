"""ONNX exports through onnxruntime: the oracle's logits and eidetic choices, states that are values, clear refusals."""

import errno
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.absent import absent

try:
    import onnx
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    absent("ONNX exports", f"{error.name} is not installed")

from bmojo_convert import to_onnx as exporter
from bmojo_convert.export_folder import ExportError
from bmojo_convert.to_onnx import to_onnx
from bmojo_edge import checkpoint, reference
from bmojo_edge.checkpoint import CheckpointError
from bmojo_edge.cli import app
from bmojo_edge.config import Config
from bmojo_edge.onnx_runner import OnnxModel, State, self_test
from tests.helpers import assert_close, odd, random_tokens, random_weights, rms_ratio

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own

MODELS: dict[str, Config] = {
    "bmojo": odd("bmojo", "bmojo", n_fading=8, tie_embeddings=True),
    "mamba": odd("mamba", rope_theta=None),
    "windowed attention": odd("attention", ssm=None, attention_window=7, n_eidetic=0),
}
STEPS = 300


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model as a folder and, beside it, its export."""
    found = {}
    for name, config in MODELS.items():
        folder = tmp_path_factory.mktemp("exports") / name
        checkpoint.save(folder, config, random_weights(config))
        found[name] = to_onnx(folder, folder.with_name(f"{name} onnx"))
    return found


def held(config: Config, model: OnnxModel, state: State, before: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Positions in the slots of each layer once `state`, at the beginning of a chunk, has chosen anew."""
    leaving = state.position[:, None] - config.window + np.arange(config.chunk_size)
    found = {}
    for layer, choice in model.choices(state).items():
        slots = before.get(layer, np.full(choice.shape, -1))
        chosen = np.take_along_axis(np.concatenate([slots, leaving], axis=1), np.maximum(choice, 0), axis=1)
        found[layer] = np.where(choice < 0, -1, chosen)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_three_hundred_steps_are_the_oracle(name: str, exports: dict[str, Path]) -> None:
    config = MODELS[name]
    tokens = random_tokens(config, 2, STEPS)
    ref, _, memory = reference.forward(config, random_weights(config), tokens, return_memory=True)
    model, chunk = OnnxModel.load(exports[name], threads=1), config.chunk_size
    state, slots = model.init_state(2), {}
    got = np.zeros_like(ref)
    at = 0
    while at < STEPS:
        if at % chunk == 0:
            slots = held(config, model, state, slots)
            for layer, positions in slots.items():
                np.testing.assert_array_equal(positions, memory.eidetic_index[:, layer, at // chunk])
        size = chunk if at % chunk == 0 and at // chunk % 2 else 1
        logits, state = model.prefill(tokens[:, at : at + size], state)
        at += size
        got[:, at - 1] = logits
        assert_close(logits, ref[:, at - 1], 1e-5, f"{name}, token {at - 1}")
    assert list(state.position) == [STEPS, STEPS]
    assert bool(slots) == (name == "bmojo")


def test_rows_at_different_positions(exports: dict[str, Path]) -> None:
    config = MODELS["bmojo"]
    tokens, lengths = random_tokens(config, 3, 60), np.array([7, 31, 60])
    model = OnnxModel.load(exports["bmojo"], threads=1)
    logits, state = model.prefill(tokens, model.init_state(3), lengths)
    for row, n in enumerate(lengths):
        ref, _ = reference.forward(config, random_weights(config), tokens[row : row + 1, :n])
        assert_close(logits[row], ref[0, -1], 1e-5, f"row {row}")
    active = np.array([True, False, True])
    more = random_tokens(config, 3, 1, seed=1)
    logits, state = model.decode_one_token(more[:, 0], state, active)
    assert list(state.position) == [8, 31, 61] and not logits[1].any()
    logits, state = model.decode_one_token(more[:, 0], state, ~active)
    ref, _ = reference.forward(config, random_weights(config), np.append(tokens[1, :31], more[1])[None])
    assert_close(logits[1], ref[0, -1], 1e-5)


def test_a_state_is_a_value(exports: dict[str, Path]) -> None:
    """What a call was given stays as it was, though buffers are used again."""
    config, model = MODELS["bmojo"], OnnxModel.load(exports["bmojo"], threads=1)
    tokens = random_tokens(config, 1, 40)
    _, fork = model.prefill(tokens[:, :20], model.init_state())
    kept = [np.array(leaf) for leaf in fork.leaves]
    first, state = model.prefill(tokens[:, 20:], fork)
    del state
    for leaf, old in zip(fork.leaves, kept, strict=True):
        np.testing.assert_array_equal(np.array(leaf), old)
    second, _ = model.prefill(tokens[:, 20:], fork)
    np.testing.assert_array_equal(first, second)


def test_memory_is_constant(exports: dict[str, Path]) -> None:
    """Buffers take turns: a long answer needs no more of them than a short one."""
    config, model = MODELS["bmojo"], OnnxModel.load(exports["bmojo"], threads=1)

    def spare_after(steps: int) -> int:
        state = model.init_state()
        for token in random_tokens(config, 1, steps)[0]:
            _, state = model.decode_one_token(token[None], state)
        del state
        gc.collect()
        return sum(map(len, model._buffers._spare.values()))

    spare_after(5)
    few = spare_after(10)
    assert spare_after(40) <= few + len(model.manifest["state"])  # init_state brings buffers of its own


def test_graphs_share_their_weights(exports: dict[str, Path]) -> None:
    """One file holds each matrix once, and the graphs themselves are small."""
    folder = exports["bmojo"]
    places: dict[str, set[str]] = {}
    for name in ("decode", "prefill"):
        proto = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        assert proto.opset_import[0].version == 21
        external = [x for x in proto.graph.initializer if x.external_data]
        places[name] = {next(e.value for e in x.external_data if e.key == "offset") for x in external}
    shared = places["decode"] & places["prefill"]
    assert len(shared) >= 0.7 * len(places["decode"]) > 5


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_graphs_agree(bits: str, tmp_path: Path) -> None:
    """Widths that blocks of 32 divide; the embedding becomes int8, the other matrices what was asked for."""
    config = odd("bmojo", d_model=64, d_ff=96, head_dim=32, vocab_size=64, tie_embeddings=True)
    checkpoint.save(tmp_path / "model", config, random_weights(config))
    out = to_onnx(tmp_path / "model", tmp_path / "out", quantize=bits)
    found = self_test(OnnxModel.load(out, threads=1))
    assert found.error < {"int8": 0.1, "int4": 0.5}[bits] and found.agree > 0.7  # random weights are the worst case
    proto = onnx.load(out / "decode.onnx", load_external_data=False)
    kinds = {node.op_type for node in proto.graph.node}
    assert "MatMulNBits" in kinds
    large = {x.name for x in proto.graph.initializer if x.data_type == onnx.TensorProto.FLOAT and len(x.dims) == 2}
    assert not [name for name in large if ("proj" in name or "embed" in name) and "scale" not in name]


def test_self_test_finds_other_weights(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(exports["mamba"], folder)
    assert self_test(OnnxModel.load(folder)).error < 1e-5
    content = bytearray((folder / "weights.bin").read_bytes())
    values = np.frombuffer(content, np.float32).copy()
    values[: len(values) // 2] *= 1.5
    (folder / "weights.bin").write_bytes(values.tobytes())
    assert self_test(OnnxModel.load(folder)).error > 1e-2


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_full_attention_is_refused_by_layer(tmp_path: Path) -> None:
    config = odd("attention", "attention", ssm=None, attention_window=(7, None), n_eidetic=0)
    checkpoint.save(tmp_path / "model", config, random_weights(config))
    with pytest.raises(ExportError, match="layer 1: full attention"):
        to_onnx(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = exports["mamba"].with_name("mamba")

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "weights.bin")

    monkeypatch.setattr(exporter.Weights, "_place", full)
    with pytest.raises(OSError, match="No space left"):
        to_onnx(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_targets_that_are_not_replaced(exports: dict[str, Path], tmp_path: Path) -> None:
    source = exports["mamba"].with_name("mamba")
    with pytest.raises(ExportError, match="exists; choose another name"):
        to_onnx(source, exports["mamba"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ExportError, match=r"is no bmojo-edge onnx export"):
        to_onnx(source, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    with pytest.raises(ExportError, match="quantize: must be one of int8, int4"):
        to_onnx(source, tmp_path / "out", quantize="int2")


def test_damaged_exports_are_named(exports: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: file is missing"):
        OnnxModel.load(tmp_path)

    def copy(name: str) -> Path:
        shutil.copytree(exports["mamba"], tmp_path / name)
        return tmp_path / name

    folder = copy("version")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(CheckpointError, match="version 2, this program reads"):
        OnnxModel.load(folder)
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "position"}))
    with pytest.raises(CheckpointError, match="position"):
        OnnxModel.load(folder)
    folder = copy("graph")
    (folder / "decode.onnx").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"decode\.onnx: onnxruntime cannot open it"):
        OnnxModel.load(folder)
    (folder / "decode.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"decode\.onnx: file is missing"):
        OnnxModel.load(folder)
    with pytest.raises(CheckpointError, match="provider 'Abacus': this onnxruntime has"):
        OnnxModel.load(exports["mamba"], providers=["Abacus"])


def test_command(exports: dict[str, Path], tmp_path: Path) -> None:
    source = exports["mamba"].with_name("mamba")
    run = CliRunner().invoke(app, ["export", "onnx", str(source), "--out", str(tmp_path / "out"), "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert {"decode.onnx", "prefill.onnx", "manifest.json", "weights.bin"} <= {*found["files"]}
    again = CliRunner().invoke(app, ["export", "onnx", str(source), "--out", str(tmp_path / "out")])
    assert again.exit_code == 1 and "exists; choose another name" in again.stderr


def test_rms_ratio_of_the_harness() -> None:
    """The bound above means something: one part in a hundred thousand of noise is seen."""
    x = np.ones((4, 4))
    assert rms_ratio(x + 2e-5, x) > 1e-5
