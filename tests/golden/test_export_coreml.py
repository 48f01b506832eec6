"""The default model, whole, as a Core ML package: what the conversion takes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.absent import absent

try:
    import coremltools  # noqa: F401  # pyright: ignore[reportMissingImports]
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    absent("Core ML exports", f"{error.name} is not installed", expected=False)  # tests/parity says where it is

from bmojo_convert import convert

EXPORT = "import sys; from bmojo_edge.cli import main; sys.argv[0] = 'bmojo-edge'; main()"


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the converter's own


class Export(NamedTuple):
    """A package and what its conversion took."""

    folder: Path
    told: dict[str, Any]  # by the command
    processor: float  # seconds


@pytest.fixture(scope="module")
def export(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Window 1,024 and sinks, float16, by the command in a process of its own."""
    tmp = tmp_path_factory.mktemp("coreml")
    model, out = convert(smollm2_gguf, tmp / "model", window=1024, sinks=4, dtype="float32"), tmp / "package"
    options = ["export", "coreml", str(model), "--out", str(out), "--json"]
    before = os.times()
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", EXPORT, *options], stdout=subprocess.PIPE, check=True)
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return Export(out, json.loads(run.stdout), processor)


def test_smollm2_converts(export: Export) -> None:
    """Under 10 minutes of processor time and 4 GB, every parameter once."""
    weights = export.told["files"]["model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"]
    print(f"{export.processor:.0f} s, peak {export.told['peak_memory'] / 1e9:.2f} GB, weights {weights / 1e6:.1f} MB")
    assert export.processor < 600 and export.told["peak_memory"] < 4e9
    assert weights < 1.01 * 2 * 134_515_008  # its parameters, two bytes each
