"""Evaluation of a converted model beside transformers' own model: the same choices, the same scores."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bmojo_convert import convert
from tests.parity import foreign
from tests.unit.tokenizer_folders import TEXT, byte_level

PEER = Path(__file__).parents[2] / "apps/eval/peer.py"


@pytest.fixture(scope="module")
def peer() -> Any:
    spec = importlib.util.spec_from_file_location("peer", PEER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("engine", ["mlx", "torch"])
def test_the_same_choices(kind: str, engine: str, peer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = foreign.save(foreign.model(kind, vocab_size=420), tmp_path / "source")
    byte_level(source)
    model = convert(source, tmp_path / "model", window=128, dtype="float32")
    lines = [line for line in TEXT[:6] if " " in line.strip()]
    sets: dict[str, list[Any]] = {
        "questions": [
            {
                "ctx": f"Question: {a}\nAnswer:",
                "choices": [f" {b[:9]}", f" {b[9:]}", " naïve", f" {a[:20]}"],
                "gold": i % 4,
            }
            for i, (a, b) in enumerate(zip(lines * 2, lines[1:] * 2 + lines[:1], strict=False))
        ],
        "words": [{"text": line.strip()} for line in lines],
    }
    for name, rows in sets.items():
        (tmp_path / f"{name}_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "found.json"
    told = [str(model), str(source), "--data", str(tmp_path), "--tasks", "questions,words", "--engine", engine]
    monkeypatch.setattr(sys, "argv", ["peer.py", *told, "--out", str(out)])
    peer.main()
    found = {row["task"]: row for row in json.loads(out.read_text())["rows"]}
    for name, rows in sets.items():
        assert found[name]["examples"] == len(rows)
        assert found[name]["bmojo-edge"] == pytest.approx(found[name]["transformers"], rel=1e-4)
        assert set(found[name]["alike"].values()) == {len(rows)}
        assert found[name]["largest_difference_nats"] < 1e-3
    assert set(found["questions"]["alike"]) == {"acc", "acc_norm", "acc_token"}
