"""The doctor: what it says of this machine, and that wrong kernels, broken models and missing engines are reported.

Kernels run through the host harness here, as if it were the device.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

mx = pytest.importorskip("mlx.core")

from bmojo_edge import checkpoint, doctor, golden  # noqa: E402
from bmojo_edge.cli import app  # noqa: E402
from bmojo_edge.config import Config  # noqa: E402
from bmojo_edge.parameters import parameter_shapes  # noqa: E402
from bmojo_metal import device_check, launch, use_kernels  # noqa: E402
from metal_kernels.host import Run  # noqa: E402
from metal_kernels.host.install import installed  # noqa: E402
from tests.metal_host.conftest import harness  # noqa: E402, F401

BODIES = Path(launch.__file__).parent
OPS = {case.op for case in device_check.cases((device_check.TINY,))}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(autouse=True)
def no_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMOJO_EDGE_HOME", str(tmp_path / "home"))


@pytest.fixture
def device(harness: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:  # noqa: F811 - the fixture's name
    """A machine whose MLX runs Metal kernels, with little to check."""
    monkeypatch.setattr(device_check, "CHECKED", (device_check.TINY,))
    monkeypatch.setattr(device_check, "TYPICAL", device_check.TINY)
    with installed(Run(mode="fast")), use_kernels(True):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with golden logits of the oracle."""
    config, rng = Config.preset("tiny", n_sinks=4), np.random.default_rng(0)
    shapes = parameter_shapes(config).items()
    weights = {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes}
    path = tmp_path / "model"
    checkpoint.save(path, config, weights)
    tokens = golden.tokens_for(config.vocab_size)
    golden.write(path, golden.Golden(tokens, golden.oracle_logits(config, weights, tokens), "the oracle"))
    return path


def broken(name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`<name>.metal` with a change, for kernels made from now on."""
    original = launch.text
    assert old in original(name)

    def text(asked: str) -> str:
        return original(asked).replace(old, new) if asked == name else original(asked)

    launch._made.cache_clear()
    monkeypatch.setattr(launch, "text", text)


@pytest.fixture(autouse=True)
def fresh_kernels() -> Iterator[None]:
    yield
    launch._made.cache_clear()


# --- without a device


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has a device")
def test_a_machine_without_metal_says_what_cannot_be_checked() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert "not checked here: the Metal kernels on a device" in result.stdout
    assert "not checked here: a golden prompt: no model is here yet" in result.stdout
    assert "Metal kernels on this device" not in result.stdout
    report = json.loads(run("--json").stdout)
    assert report["ok"]
    assert report["kernels"] == {"checks": [], "timings": []}
    assert len(report["unchecked"]) == 2
    assert report["machine"]["memory_bytes"] > 2**30
    engines = {engine["name"]: engine for engine in report["engines"]}
    assert engines["mlx"]["version"] == mx.__version__
    assert engines["mlx"]["device"] == "CPU"


def test_a_missing_engine_is_told_and_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "torch" else found(name))
    result = run()
    assert result.exit_code == 0
    assert "pip install 'bmojo-edge[torch]'" in result.stdout


# --- golden prompt


def test_the_golden_prompt_of_a_sound_model(folder: Path) -> None:
    result = run(str(folder))
    assert result.exit_code == 0, result.output
    assert "golden prompt: the model gives the logits kept beside it" in result.stdout
    assert json.loads(run(str(folder), "--json").stdout)["golden"]["ok"] is True


def test_a_model_that_computes_something_else_fails(folder: Path) -> None:
    kept = golden.read(folder)
    assert kept is not None
    golden.write(folder, kept._replace(logits=kept.logits[::-1].copy()))
    result = run(str(folder), "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert not report["ok"]
    assert "logits differ from those of the oracle" in report["failures"][0]
    assert "failed: golden prompt:" in run(str(folder)).stderr


def test_a_model_without_golden_logits_is_not_checked(folder: Path) -> None:
    (folder / golden.FILE).unlink()
    result = run(str(folder))
    assert result.exit_code == 0
    assert f"has no {golden.FILE}" in result.stdout


def test_a_model_that_is_not_there_fails(tmp_path: Path) -> None:
    result = run(str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert "nothing" in result.stderr
    assert "Traceback" not in result.output


# --- kernels, through the harness


@pytest.mark.usefixtures("device")
def test_sound_kernels_pass_and_are_timed() -> None:
    result = run("--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0, report["failures"]
    checks, timings = report["kernels"]["checks"], report["kernels"]["timings"]
    assert {check["op"] for check in checks} == OPS == {timing["op"] for timing in timings}
    assert {check["dtype"] for check in checks if check["op"] == "memory_attention"} == set(device_check.BOUNDS)
    assert all(check["error"] <= device_check.BOUNDS[check["dtype"]] for check in checks)
    assert all(timing["kernel_ms"] > 0 and timing["plain_ms"] > 0 for timing in timings)
    assert not any("Metal kernels" in sentence for sentence in report["unchecked"])


@pytest.mark.usefixtures("device")
def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken("conv", "sum += value", "sum = value", monkeypatch)
    result = run()
    assert result.exit_code == 1
    assert "failed: silu_conv float16 at b=1 t=2" in result.stderr
    assert "RMS-error ratio" in result.stderr
    assert "failed: innovation_scores" not in result.stderr
    report = json.loads(run("--json").stdout)
    wrong = {check["op"] for check in report["kernels"]["checks"] if check["problem"]}
    assert wrong == {"silu_conv"}
    assert "silu_conv" not in {timing["op"] for timing in report["kernels"]["timings"]}


@pytest.mark.usefixtures("device")
def test_a_kernel_that_does_not_compile_is_named_and_others_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    broken("select", ";", " nonsense;", monkeypatch)
    report = json.loads(run("--json").stdout)
    wrong = {check["op"]: check["problem"] for check in report["kernels"]["checks"] if check["problem"]}
    assert set(wrong) == {"select_eidetic", "promote"}
    assert "CompileError" in wrong["promote"] or "TypeCheckError" in wrong["promote"]


# --- the check itself


class Nothing:
    """A kernel that launches nothing and leaves zeros; `names` of those made."""

    names: set[str] = set()  # noqa: RUF012 - shared on purpose

    def __init__(self, name: str, **_: Any) -> None:
        self.names.add(name.removeprefix("bmojo_"))

    def __call__(self, *, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[Any]:
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]


def test_every_body_runs_and_kernels_that_do_nothing_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.fast, "metal_kernel", Nothing)
    Nothing.names.clear()
    checks = [device_check.check(case) for case in device_check.cases(device_check.CHECKED)]
    bodies = {path.stem for path in BODIES.glob("*.metal") if not path.stem.endswith("_header")} - {"common"}
    assert Nothing.names == bodies
    assert [check for check in checks if check.problem is None] == []


def test_errors_are_relative_and_not_fooled_by_nan() -> None:
    ref = np.array([3.0, 4.0])
    assert device_check.rms_ratio(ref * 1.01, ref) == pytest.approx(0.01)
    assert not device_check.rms_ratio(np.array([np.nan, 4.0]), ref) <= 1.0
