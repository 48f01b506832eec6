"""The benchmark of the kernels, rehearsed on the CPU: rows as their readers expect them, failures among them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

BENCH = Path(__file__).parents[2] / "apps/bench/kernels.py"
SECTIONS = "selective_scan,causal_conv,select_eidetic,gated_linear_attention,device"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True)


def test_a_rehearsal_writes_rows_and_keeps_those_of_other_sections(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    others = [{"kernel": "layer", "case": "B4", "engine": "bmojo"}, {"kernel": "selective_scan", "case": "old"}]
    out.write_text(json.dumps({"rows": others}))
    done = run("--device", "cpu", "--tiny", "--sections", SECTIONS, "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "gpu", "rows"} <= set(found)
    rows = {(row["kernel"], row["engine"]): row for row in found["rows"]}
    assert rows["layer", "bmojo"] == others[0]
    assert not any(row["case"] == "old" for row in found["rows"])
    scan = rows["selective_scan", "bmojo_cuda"]
    assert (scan["b"], scan["l"], scan["d"], scan["n"], scan["dtype"]) == (1, 64, 32, 16, "bfloat16")
    assert scan["fwdbwd_ms"] > 0 < scan["fwd_ms"]
    assert 0 < scan["error"] < 1e-2
    assert rows["select_eidetic", "bmojo_cuda"]["fwdbwd_ms"] is None
    peer = rows["gated_linear_attention", "fla chunk_simple_gla"]  # not installed here, or needs a GPU
    assert peer["failed"]
    assert "fwd_ms" not in peer
    assert "fla chunk_simple_gla" in done.stdout


def test_an_unknown_section_is_named() -> None:
    done = run("--sections", "scan")
    assert done.returncode == 2
    assert "--sections: scan is none of memory_attention" in done.stderr
