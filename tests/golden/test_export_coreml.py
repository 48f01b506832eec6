"""The default model, whole, as a Core ML package: what the conversion takes, and what the package computes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.absent import absent

try:
    import coremltools  # noqa: F401  # pyright: ignore[reportMissingImports]
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    absent("Core ML exports", f"{error.name} is not installed", expected=False)  # tests/parity says where it is

from apps.coreml import selftest
from bmojo_convert import convert
from tests.parity.mil import functions

EXPORT = "import sys; from bmojo_edge.cli import main; sys.argv[0] = 'bmojo-edge'; main()"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the converter's own
def test_smollm2_whole(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Window 1,024 and sinks, float16: under 10 minutes of processor time and 4 GB; it passes its self-test."""
    model = convert(smollm2_gguf, tmp_path / "model", window=1024, sinks=4, dtype="float32")
    out, start, before = tmp_path / "package", time.perf_counter(), os.times()
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        EXPORT,
        "export",
        "coreml",
        str(model),
        "--out",
        str(out),
        "--json",
    ]
    told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    after, seconds = os.times(), time.perf_counter() - start
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    weights = told["files"]["model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"]
    print(f"{seconds:.0f} s, {processor:.0f} s of processor time; peak {told['peak_memory'] / 1e9:.2f} GB")
    print(f"weights {weights / 1e6:.1f} MB")
    assert processor < 600 and told["peak_memory"] < 4e9
    assert weights < 1.01 * 2 * 134_515_008  # every parameter once, in two bytes
    found = selftest.run(out, functions(out / "model.mlpackage"))
    print(selftest.report(found))
    assert found.passed and found.same_top == len(found.positions)
