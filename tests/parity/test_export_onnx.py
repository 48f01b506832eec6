"""ONNX exports through onnxruntime: the oracle's logits and eidetic choices, states that are values, clear refusals."""

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
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

import bmojo_edge as be
from bmojo_convert import to_onnx as exporter
from bmojo_convert.export_folder import ExportError
from bmojo_convert.to_mlxfn import to_mlxfn
from bmojo_convert.to_onnx import to_onnx
from bmojo_edge import checkpoint, reference
from bmojo_edge.checkpoint import CheckpointError
from bmojo_edge.cli import app
from bmojo_edge.config import Config
from bmojo_edge.mlx.mlxfn_runner import MlxfnModel
from bmojo_edge.onnx_runner import OnnxModel, self_test
from bmojo_edge.session import Session, SessionError
from bmojo_edge.state import State, leaves
from bmojo_edge.torch import load as load_torch
from tests.helpers import assert_close, assert_states_close, odd, random_tokens, random_weights, rms_ratio
from tests.unit.tokenizer_folders import byte_level

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own

MODELS: dict[str, Config] = {
    "bmojo": odd("bmojo", "bmojo", n_fading=8, tie_embeddings=True, vocab_size=420),
    "mamba": odd("mamba", rope_theta=None),
    "windowed attention": odd("attention", ssm=None, attention_window=7, n_eidetic=0),
}
STEPS = 300


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    """Tracing takes seconds; the same graph of the same configuration is traced once, for its weights are the same."""
    real, known = exporter.export_graph, dict[Any, onnx.ModelProto]()

    def export_graph(graph: Any) -> onnx.ModelProto:
        key = type(graph), graph.config
        known[key] = known[key] if key in known else real(graph)
        copy = onnx.ModelProto()
        copy.CopyFrom(known[key])
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "export_graph", export_graph)
        yield


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model as a folder and, beside it, its export."""
    found = {}
    for name, config in MODELS.items():
        folder = tmp_path_factory.mktemp("exports") / name
        checkpoint.save(folder, config, random_weights(config))
        if name == "bmojo":
            byte_level(folder)
        found[name] = to_onnx(folder, folder.with_name(f"{name} onnx"))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_three_hundred_steps_are_the_oracle(name: str, exports: dict[str, Path]) -> None:
    """Logits, eidetic choices, and in the end the whole state, which is the runtime's own."""
    config = MODELS[name]
    tokens = random_tokens(config, 2, STEPS)
    ref, ref_state, memory = reference.forward(config, random_weights(config), tokens, return_memory=True)
    model, chunk = OnnxModel.load(exports[name], threads=1), config.chunk_size
    state, eidetic = model.init_state(2), [i for i, kind in enumerate(config.layer_types) if kind == "bmojo"]
    at = 0
    while at < STEPS:
        size = chunk if at % chunk == 0 and at // chunk % 2 else 1
        logits, state = model.prefill(tokens[:, at : at + size], state)
        for layer in eidetic:
            positions = state.layers[layer].eidetic.positions
            np.testing.assert_array_equal(positions, memory.eidetic_index[:, layer, at // chunk])
        at += size
        assert_close(logits, ref[:, at - 1], 1e-5, f"{name}, token {at - 1}")
    assert list(state.position) == [STEPS, STEPS]
    assert bool(eidetic) == (name == "bmojo")
    assert_states_close(state, ref_state, 1e-5)


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
    assert list(state.position) == [8, 31, 61] and not np.asarray(logits)[1].any()
    logits, state = model.decode_one_token(more[:, 0], state, ~active)
    ref, _ = reference.forward(config, random_weights(config), np.append(tokens[1, :31], more[1])[None])
    assert_close(logits[1], ref[0, -1], 1e-5)


def test_rows_that_rest_at_random(exports: dict[str, Path]) -> None:
    """Every row at its own position in its own chunk: some choose anew where others do not, or rest just there."""
    config, rows = MODELS["bmojo"], 4
    tokens, rng = random_tokens(config, rows, 60), np.random.default_rng(1)
    ref, _ = reference.forward(config, random_weights(config), tokens)
    model = OnnxModel.load(exports["bmojo"], threads=1)
    state, read, seen = model.init_state(rows), np.zeros(rows, int), set[tuple[bool, bool]]()
    while read.max() < tokens.shape[1]:
        active = rng.random(rows) < 0.6
        due = read % config.chunk_size == 0
        seen |= set(zip(active.tolist(), due.tolist(), strict=True)) if due.any() and not due.all() else set()
        logits, state = model.decode_one_token(tokens[np.arange(rows), read], state, active)
        for row in np.flatnonzero(active):
            assert_close(logits[row], ref[row, read[row]], 1e-5, f"row {row}, token {read[row]}")
        read += active
        np.testing.assert_array_equal(state.position, read)
    assert len(seen) == 4 and len(set(read.tolist())) > 1


def test_a_state_is_a_value(exports: dict[str, Path]) -> None:
    """What a call was given stays as it was, though buffers are used again."""
    config, model = MODELS["bmojo"], OnnxModel.load(exports["bmojo"], threads=1)
    tokens = random_tokens(config, 1, 40)
    _, fork = model.prefill(tokens[:, :20], model.init_state())
    kept = [np.array(leaf) for _, leaf in leaves(fork)]
    first, state = model.prefill(tokens[:, 20:], fork)
    del state
    for (name, leaf), old in zip(leaves(fork), kept, strict=True):
        np.testing.assert_array_equal(np.array(leaf), old, name)
    second, _ = model.prefill(tokens[:, 20:], fork)
    np.testing.assert_array_equal(first, second)


def arrays_of(state: State) -> dict[str, int]:
    """Where the arrays of the window's rings are."""
    rings = {name: leaf for name, leaf in leaves(state) if name.endswith(("window.k", "fading.v"))}
    return {name: leaf.settled().value.data_ptr() for name, leaf in rings.items()}


def test_rings_stay_where_they_are(exports: dict[str, Path]) -> None:
    """They are written in place, unless somebody holds the state before."""
    config, model = MODELS["bmojo"], OnnxModel.load(exports["bmojo"], threads=1)
    rings = [f"layers.{i}.{ring}.{x}" for i in range(2) for ring in ("window", "fading") for x in "kv"]
    assert sorted(model.manifest["graphs"]["decode"]["in_place"]) == sorted(rings)
    assert not model.manifest["graphs"]["prefill"]["in_place"]
    _, state = model.decode_one_token(np.array([1]), model.init_state())
    first = arrays_of(state)
    assert len(first) == 4
    for token in random_tokens(config, 1, 20)[0]:
        logits, state = model.decode_one_token(token[None], state)
        assert np.isfinite(np.asarray(logits)).all()
    assert arrays_of(state) == first
    held = state
    logits, state = model.decode_one_token(np.array([1]), state)
    moved = arrays_of(state)
    assert not set(moved.values()) & set(first.values())
    again, _ = model.decode_one_token(np.array([1]), held)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(logits))


def test_steps_nobody_looks_at(exports: dict[str, Path]) -> None:
    """A state may be moved far before its first logits are looked at, and looking late finds what it was then."""
    config, model = MODELS["bmojo"], OnnxModel.load(exports["bmojo"], threads=1)
    tokens, late = random_tokens(config, 1, 1200), {}
    state = model.init_state()
    for t, token in enumerate(tokens[0]):
        logits, state = model.decode_one_token(token[None], state)
        if t in (30, 31, 59):
            late[t] = logits
    assert np.isfinite(np.array(state.layers[0].window.k)).all()
    ref, _ = reference.forward(config, random_weights(config), tokens[:, :60])
    for t, logits in late.items():
        assert_close(np.asarray(logits), ref[:, t], 1e-5, f"token {t}")


def test_memory_is_constant(exports: dict[str, Path]) -> None:
    """Buffers take turns: a long answer needs no more of them than a short one."""
    config, model = MODELS["bmojo"], OnnxModel.load(exports["bmojo"], threads=1)

    def spare_after(steps: int) -> int:
        state = model.init_state()
        for token in random_tokens(config, 1, steps)[0]:
            _, state = model.decode_one_token(token[None], state)
        del state
        gc.collect()
        return model._buffers.count()

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
    out = to_onnx(tmp_path / "model", tmp_path / "out", weights=bits)
    found = self_test(OnnxModel.load(out, threads=1))
    assert found.error < {"int8": 0.1, "int4": 0.5}[bits] and found.agree > 0.7  # random weights are the worst case
    proto = onnx.load(out / "decode.onnx", load_external_data=False)
    kinds = {node.op_type for node in proto.graph.node}
    assert "MatMulNBits" in kinds
    tables = [list(x.dims) for x in proto.graph.initializer if x.data_type == onnx.TensorProto.INT8]
    assert [64, 2, 32] in tables  # the embedding, in blocks of 32
    large = {
        x.name: list(x.dims)
        for x in proto.graph.initializer
        if x.data_type == onnx.TensorProto.FLOAT and np.prod(x.dims) > 1000 and "scale" not in x.name
    }
    # The SSM's convolution, A and projections to steps, whose rows blocks of 32 do not divide.
    assert all(max(dims) <= 128 and min(dims) <= 8 for dims in large.values()), large


def test_self_test_finds_other_weights(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(exports["mamba"], folder)
    assert self_test(OnnxModel.load(folder)).error < 1e-5
    content = bytearray((folder / "weights.bin").read_bytes())
    values = np.frombuffer(content, np.float32).copy()
    values[: len(values) // 2] *= 1.5
    (folder / "weights.bin").write_bytes(values.tobytes())
    assert self_test(OnnxModel.load(folder)).error > 1e-2


# --- conversations ----------------------------------------------------------------------------------------------------

TURNS = ["Hello there.", "The river runs to the sea, the sea runs to the river.", "And then?"]


class Counted(OnnxModel):
    """An export that counts the tokens it is fed."""

    fed = 0

    def prefill(self, tokens: Any, state: State, lengths: Any = None) -> tuple[np.ndarray, State]:
        self.fed += tokens.shape[1]
        return super().prefill(tokens, state, lengths)

    def decode_one_token(self, token: Any, state: State, active: Any = None) -> tuple[Any, State]:
        self.fed += 1
        return super().decode_one_token(token, state, active)


def said(session: Session, text: str, **options: Any) -> tuple[str, list[int]]:
    """The answer, and all its ids."""
    return "".join(session.say(text, **options)), session.turns[-1].answer_ids


def test_a_conversation_is_that_of_the_model(exports: dict[str, Path]) -> None:
    """Greedy, sampled and cut answers, over chunks and the window; every token is fed once, in whatever turn."""
    export = exports["bmojo"]
    lm, counted = be.load(export.with_name("bmojo")), Counted.load(export, threads=1)
    ours, theirs, whole = Session(lm, "Be brief."), Session(counted, "Be brief."), ""
    greedy, drawn = {"max_tokens": 20}, {"max_tokens": 20, "temperature": 0.8, "top_p": 0.9, "seed": 3}
    for text, options in zip(TURNS, (greedy, drawn, greedy), strict=True):
        position = theirs.position
        answer = said(theirs, text, **options)
        assert answer == said(ours, text, **options) and len(answer[1]) > 2
        whole = answer[0]
        assert theirs.position == ours.position > position + 20
        assert counted.fed == int(theirs.moment.state.position[0]) >= theirs.position - 1
    assert counted.fed > 2 * lm.config.window
    assert theirs.rolling_hash == ours.rolling_hash and theirs.nbytes == ours.nbytes
    assert_states_close(theirs.moment.state, ours.moment.state, 1e-4)  # both in float32
    stop = whole[3:6]
    assert said(theirs.rewind(1), TURNS[2], **greedy, stop=stop) == said(ours.rewind(1), TURNS[2], **greedy, stop=stop)
    assert theirs.turns[-1].answer == whole[: whole.index(stop)]


def test_a_saved_conversation_goes_on_in_any(exports: dict[str, Path], tmp_path: Path) -> None:
    """The state is the runtime's own, so float32 exports and both twins read one another's files."""
    export = exports["bmojo"]
    source = export.with_name("bmojo")
    models = {"mlx": be.load(source), "torch": load_torch(source), "onnx": OnnxModel.load(export, threads=1)}
    models["mlxfn"] = MlxfnModel.load(to_mlxfn(source, tmp_path / "functions"))
    answers = dict[str, list[Any]]()
    for name, lm in models.items():
        session, answers[name] = Session(lm), []
        for text in TURNS[:2]:
            answers[name].append(said(session, text, max_tokens=20))
        session.save(tmp_path / name)
        for other in models.values():
            answers[name].append(said(Session.open(tmp_path / name, other), TURNS[2], max_tokens=20))
    first, *others = answers.values()
    assert all(other == first for other in others) and len(set(map(str, first[2:]))) == 1
    folder = tmp_path / "int8"
    shutil.copytree(export, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "weights": f"{manifest['weights']}-int8"}))
    with pytest.raises(SessionError, match="was made with a model of other weights"):
        Session.open(tmp_path / "onnx", OnnxModel.load(folder))


CHAT = """
import sys
for name in {absent!r}:
    sys.modules[name] = None
from bmojo_edge.cli import main
main()
"""


def test_chat_command(exports: dict[str, Path], tmp_path: Path) -> None:
    """What `chat` says of the export is what it says of the model, without PyTorch or MLX; its file goes on."""

    def chat(folder: Path, lines: list[str], file: str, *absent: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CHAT.format(absent=absent), "chat", str(folder), "--temp", "0"]
        command += ["--max-tokens", "12", "--session", str(tmp_path / file)]
        paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
        lines = [f"{line}\n" for line in lines]
        return subprocess.run(command, input="".join(lines), capture_output=True, text=True, env=os.environ | paths)

    export = exports["bmojo"]
    lines = [TURNS[0], TURNS[1], "/regenerate", "/memory"]
    want = chat(export.with_name("bmojo"), lines, "ours")
    got = chat(export, lines, "theirs", "mlx", "torch")
    assert got.returncode == want.returncode == 0, got.stderr + want.stderr
    assert got.stdout == want.stdout and got.stdout.count("\n") >= 3
    assert "an export does not tell where it goes" in got.stderr and "eidetic" in got.stderr
    again, other = (
        chat(export, [TURNS[2]], "theirs", "mlx", "torch"),
        chat(export.with_name("bmojo"), [TURNS[2]], "ours"),
    )
    assert "resumed at position" in again.stderr and again.stdout == other.stdout != ""


def test_storage_is_for_models(exports: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    run = CliRunner().invoke(app, ["chat", str(exports["bmojo"]), "--memory", str(store), "--prompt", "Hello"])
    assert run.exit_code == 2 and "an export has no storage" in run.stderr and not store.exists()


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

    monkeypatch.setattr(exporter.WeightsFile, "_place", full)
    with pytest.raises(OSError, match="No space left"):
        to_onnx(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_named_before_any_work(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    source = exports["mamba"].with_name("mamba")
    run = CliRunner().invoke(app, ["export", "onnx", str(source), "--out", str(tmp_path / "out")])
    assert run.exit_code == 1 and "pip install 'bmojo-edge[onnx]'" in run.stderr
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an older export was to be replaced: that one stays."""
    source, out = exports["mamba"].with_name("mamba"), tmp_path / "out"
    shutil.copytree(exports["mamba"], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "_check", stop)
    with pytest.raises(KeyboardInterrupt):
        to_onnx(source, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_targets_that_are_not_replaced(exports: dict[str, Path], tmp_path: Path) -> None:
    source = exports["mamba"].with_name("mamba")
    with pytest.raises(ExportError, match="exists; choose another name"):
        to_onnx(source, exports["mamba"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ExportError, match=r"is no bmojo-edge onnx export"):
        to_onnx(source, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    with pytest.raises(ExportError, match="weights: must be one of float32, int8, int4"):
        to_onnx(source, tmp_path / "out", weights="int2")


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
    assert 0 < found["seconds"] < 600 and found["peak_memory"] > 100e6
    again = CliRunner().invoke(app, ["export", "onnx", str(source), "--out", str(tmp_path / "out")])
    assert again.exit_code == 1 and "exists; choose another name" in again.stderr


def test_rms_ratio_of_the_harness() -> None:
    """The bound above means something: one part in a hundred thousand of noise is seen."""
    x = np.ones((4, 4))
    assert rms_ratio(x + 2e-5, x) > 1e-5
