"""Core ML exports, run by our own reading of MIL (mil.py): the oracle's logits and choices, one state for all."""

import errno
import json
import platform
import subprocess
import sys
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
    wheels = sys.platform == "darwin" or (sys.platform, platform.machine()) == ("linux", "x86_64")
    expected = wheels and sys.version_info < (3, 14)  # what pyproject.toml's extra `dev` installs
    absent("Core ML exports", f"{error.name} is not installed", expected=expected)

from apps.coreml import selftest
from bmojo_convert import to_coreml as exporter
from bmojo_convert.export_folder import ExportError
from bmojo_convert.step import Decode
from bmojo_convert.to_coreml import to_coreml
from bmojo_edge import checkpoint, reference
from bmojo_edge.cli import app
from bmojo_edge.config import SSM, Config
from bmojo_edge.torch import Model
from tests.helpers import assert_close, odd, random_tokens, random_weights, rms_ratio
from tests.mixers import SSMS
from tests.parity.mil import Package, functions

pytestmark = pytest.mark.filterwarnings("ignore")  # the converter's own

MODELS: dict[str, Config] = {
    "bmojo": odd("bmojo", n_fading=8, tie_embeddings=True),
    "mamba": odd("mamba", rope_theta=None, d_model=16),  # here and below states need no padding
    "windowed attention": odd("attention", ssm=None, attention_window=7, n_eidetic=0, head_dim=32),
}
STEPS = 300


class Host(selftest.Driver):
    """The self-test's driver on our executor; `held` is the positions in each layer's eidetic slots."""

    def __init__(self, folder: Path, states: str = "float16") -> None:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        self.held: dict[int, np.ndarray] = {}
        super().__init__(manifest, functions(folder / manifest["package"], states))

    def commit(self) -> dict[str, Any]:
        found, config = super().commit(), self.manifest["config"]
        leaving = self.position - config["window"] + np.arange(self.manifest["chunk"])
        for name, choice in found.items():
            layer = int(name.removeprefix("choice_"))
            slots = np.concatenate([self.held.get(layer, np.full(choice.shape[1], -1)), leaving])
            self.held[layer] = np.where(choice[0] < 0, -1, slots[np.maximum(choice[0], 0)])
        return found


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


def compared(folder: Path, config: Config, states: str, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray, float]:
    """(logits by the package, by the oracle, share of equal eidetic choices); chunks and single tokens take turns."""
    tokens = random_tokens(config, 1, steps)
    ref, _, memory = reference.forward(config, half(config), tokens, return_memory=True)
    host, chunk, at = Host(folder, states), config.chunk_size, 0
    got, want, same = [], [], []
    while at < steps:
        size = chunk if at % chunk == 0 and at // chunk % 2 and at + chunk <= steps else 1
        got.append(host.feed(tokens[0, at : at + size]))
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
    package = host.models["decode"].package
    shapes = {x["name"]: tuple(x["shape"]) for x in host.manifest["state"] if x["kind"] == "state"}
    assert shapes and all(shape[-1] % 32 == 0 for shape in shapes.values())
    for function, described in host.manifest["functions"].items():
        assert package.states(function) == shapes
        assert package.inputs(function) == {*described["inputs"]}
    assert set(host.wide) == {"layers_0_ssm_ssm"}
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.mlpackage", "manifest.json", "self_test.safetensors"}


def test_weights_are_on_the_disk_once(packages: Any) -> None:
    """Both functions read the same places of one file, which is hardly larger than the parameters are."""
    folder = packages("bmojo", "float32")
    package = Package(folder / "model.mlpackage")
    parameters = {name: 4 * x.size for name, x in random_weights(MODELS["bmojo"]).items()}
    decode, prefill = package.places("decode"), package.places("prefill")
    shared = sum(size for place, size in decode.items() if place in prefill)
    assert shared > 0.98 * sum(parameters.values())
    (file,) = folder.rglob("weight.bin")
    assert file.stat().st_size < 1.3 * sum(parameters.values())  # blocks of 64 bytes, masks


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4", "palettized4"])
def test_fewer_bits(weights: str, tmp_path: Path) -> None:
    """Widths that blocks divide: the package holds compressed matrices, stays near the oracle and mostly agrees.

    Without eidetic slots: other weights make other choices, which are right for them and far from the oracle's.
    """
    config = odd("bmojo", d_model=64, d_ff=96, head_dim=32, vocab_size=64, n_eidetic=0, tie_embeddings=True)
    folder = exported(tmp_path, config, weights)
    got, want, _ = compared(folder, config, "float16")
    assert rms_ratio(got, want) < {"int8": 0.1, "int4": 0.3, "palettized4": 0.3}[weights]  # random weights
    agree = np.mean(got.argmax(-1) == want.argmax(-1))
    assert agree > {"int8": 0.95, "int4": 0.8, "palettized4": 0.8}[weights]
    kinds = Package(folder / "model.mlpackage").operations("decode")
    assert ("constexpr_lut_to_dense" if weights == "palettized4" else "constexpr_blockwise_shift_scale") in kinds


@pytest.mark.slow
def test_no_position_is_in_the_state(packages: Any) -> None:
    """Past 2,048, where half precision skips integers, choices and logits are the oracle's still."""
    config, steps = MODELS["bmojo"], 2_400
    tokens, host = random_tokens(config, 1, steps), Host(packages("bmojo", "float32"), "float32")
    ref, _, memory = reference.forward(config, half(config), tokens, return_memory=True)
    for at in range(0, steps, config.chunk_size):
        logits = host.feed(tokens[0, at : at + config.chunk_size])
        assert_close(logits, ref[0, at + config.chunk_size - 1], 1e-4, f"token {at}")
        np.testing.assert_array_equal(host.held[0], memory.eidetic_index[0, 0, at // config.chunk_size])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SSMS if SSMS[name].get("d_conv") != 1])
def test_mixers(name: str, tmp_path: Path) -> None:
    """mamba2, gdn and gka with every option, alone and in a bmojo layer, in float32."""
    kind = SSMS[name]["kind"]
    for config in (odd(kind, ssm=SSMS[name], rope_theta=None), odd("bmojo", ssm=SSMS[name])):
        folder = tmp_path / config.layer_types[0]
        got, want, same = compared(exported(folder, config, "float32"), config, "float32", 60)
        assert_close(got, want, 1e-4, f"{name}, {config.layer_types[0]}")
        assert same == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mamba2", "gdn", "gka"])
def test_mixers_in_half_precision(kind: str, tmp_path: Path) -> None:
    config = odd(kind, ssm=SSMS[kind], rope_theta=None)
    got, want, _ = compared(exported(tmp_path, config, "float16"), config, "float16", 60)
    assert_close(got, want, 2e-2, kind)


WIDE = Config(  # SmolLM2's widths and heads; its vocabulary cut, memories short enough that 340 tokens cross them all
    layer_types=("bmojo", "bmojo", "attention", "mamba"), vocab_size=512, d_model=576, n_heads=9, n_kv_heads=3,
    head_dim=64, d_ff=1536, window=64, n_fading=32, n_eidetic=16, n_sinks=4, chunk=16, attention_window=48,
    ssm=SSM(), rope_theta=1e5, tie_embeddings=True,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "bound"), [("float32", 1e-4), ("float16", 2e-2)])
def test_four_layers_as_wide_as_smollm2(weights: str, bound: float, tmp_path: Path) -> None:
    got, want, same = compared(exported(tmp_path, WIDE, weights), WIDE, weights, 340)
    print(f"{weights}: RMS ratio {rms_ratio(got, want):.2e}, equal choices {same:.4f}")
    assert_close(got, want, bound, weights)
    assert same == 1 if weights == "float32" else same > 0.9


# --- the self-test ----------------------------------------------------------------------------------------------------


def test_self_test_passes_and_fails(packages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes on the package, and fails where one state was not filled or another function is called."""
    folder = packages("bmojo", "float32")
    models = functions(folder / "model.mlpackage")
    found = selftest.run(folder, models)
    assert found.passed and found.overall < 2e-2 and found.same_top == len(found.positions)
    assert "PASS" in selftest.report(found) and set(found.seconds) == {"decode", "prefill"}
    monkeypatch.setattr(selftest.Driver, "commit", lambda self: {})
    forgot = selftest.run(folder, models)
    assert not forgot.passed and "FAIL" in selftest.report(forgot)


def test_self_test_off_a_mac(packages: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["selftest.py", str(packages("bmojo", "float32"))])
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(SystemExit, match="2"):
        selftest.main()
    assert "Apple systems only" in capsys.readouterr().err


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_full_attention_is_refused_by_layer(tmp_path: Path) -> None:
    config = odd("attention", "attention", ssm=None, attention_window=(7, None), n_eidetic=0)
    checkpoint.save(tmp_path / "model", config, random_weights(config))
    with pytest.raises(ExportError, match="layer 1: full attention"):
        to_coreml(tmp_path / "model", tmp_path / "out")
    with pytest.raises(ExportError, match="weights: must be one of float32, float16"):
        to_coreml(tmp_path / "model", tmp_path / "out", weights="int2")
    assert not (tmp_path / "out").exists()


def test_a_convolution_of_one_tap_is_refused(tmp_path: Path) -> None:
    config = odd("mamba2", ssm=SSMS["mamba2, no conv bias, conv of one"], rope_theta=None)
    checkpoint.save(tmp_path / "model", config, random_weights(config))
    with pytest.raises(ExportError, match=r"layers\.0\.conv: Core ML has no empty arrays"):
        to_coreml(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing(packages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = packages("mamba", "float32").with_name("model")

    class Half:
        def save(self, path: str) -> None:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr(exporter, "convert", lambda graph, weights: Half())
    with pytest.raises(OSError, match="No space left"):
        to_coreml(source, tmp_path / "out", weights="float32")
    assert not list(tmp_path.iterdir())


def test_a_lost_write_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handing the graph a buffer itself makes the converter drop the writes to it; no such package is made."""
    model = Model(MODELS["mamba"]).eval().requires_grad_(False)
    monkeypatch.setattr(exporter.Stateful, "_held", lambda self, name: self.get_buffer(exporter.feature(name)))
    with pytest.raises(ExportError, match=r"layers\.0\.conv: coremltools lost the writes"):
        exporter.convert(Decode(model), "float32")


@pytest.mark.slow
def test_a_full_disk(packages: Any, tmp_path: Path) -> None:
    """Where no file may be larger than 16 KiB the command says so in a line and leaves nothing."""
    source = packages("bmojo", "float32").with_name("model")
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14)); "
    code = limited + "from bmojo_edge.cli import main; main()"
    command = [sys.executable, "-c", code, "export", "coreml", str(source), "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "is the disk full?" in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert "Warning" not in run.stderr  # of coremltools and PyTorch's tracer
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("package", "weights"), [("coremltools", "float16"), ("sklearn", "palettized4")])
def test_a_missing_package(
    package: str, weights: str, packages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = packages("mamba", "float32").with_name("model")
    monkeypatch.setitem(sys.modules, package, None)
    command = ["export", "coreml", str(source), "--out", str(tmp_path / "out"), "--weights", weights]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 1 and "pip install 'bmojo-edge[coreml]'" in run.stderr
    assert not list(tmp_path.iterdir())


def test_numpy_that_is_too_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "__version__", "2.4.0")
    with pytest.raises(ExportError, match=r"does not work with numpy 2\.4\.0: pip install 'numpy<2.4'"):
        to_coreml(tmp_path / "model", tmp_path / "out")


def test_what_is_not_ours_is_not_replaced(packages: Any, tmp_path: Path) -> None:
    source = packages("mamba", "float32").with_name("model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letters.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists; choose another name"):
        to_coreml(source, tmp_path / "out")
    with pytest.raises(ExportError, match="is no bmojo-edge coreml export"):
        to_coreml(source, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "letters.txt").read_text() == "mine"


def test_command(packages: Any, tmp_path: Path) -> None:
    """Sizes and peak memory are told, progress is ours alone; an export of ours is replaced when asked."""
    source = packages("mamba", "float32").with_name("model")
    command = ["export", "coreml", str(source), "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(app, [*command, "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert "manifest.json" in found["files"] and any("weight.bin" in name for name in found["files"])
    assert 10**8 < found["peak_memory"] < 10**11
    assert "Converting PyTorch Frontend" not in run.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["weights"] == "float16"
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1 and "exists; choose another name" in again.stderr
    replaced = CliRunner().invoke(app, [*command, "--weights", "float32", "--overwrite"])
    assert replaced.exit_code == 0 and "Peak memory" in replaced.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["weights"] == "float32"
