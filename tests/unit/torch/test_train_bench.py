"""The benchmark of training speed, rehearsed with small models on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "apps" / "bench" / "train.py"


@pytest.mark.slow
def test_cases_take_turns_and_one_that_fails_is_a_row(tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    options = ["--small", "--no-compile", "--steps", "4", "--tokens", "128", "--out", str(out), "--limit", "300"]
    for more in (
        ["--gpus", "1", "2", "--models", "bmojo", "mamba", "--lengths", "64"],
        ["--gpus", "1", "--lengths", "100"],
    ):
        subprocess.run([sys.executable, str(SCRIPT), *options, *more], check=True, timeout=400)
    rows = json.loads(out.read_text())["rows"]
    found = {(row["model"], row["seq_len"], row["gpus"]): row for row in rows}
    good = {("bmojo", 64, 1), ("mamba", 64, 1), ("bmojo", 64, 2)}
    assert good == {key for key, row in found.items() if "failed" not in row}
    assert all(found[key]["tokens_per_s"] > 0 and found[key]["params"] > 0 for key in good)
    assert {key for key in found if key not in good} == {(m, 100, 1) for m in ("bmojo", "transformer", "mamba")}
