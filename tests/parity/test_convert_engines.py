"""Converted folders on both engines: they load, give the golden logits, and notice a damaged weight."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bmojo_convert import convert
from bmojo_edge.checkpoint import CheckpointError
from tests.parity import foreign

OPTIONS: dict[str, dict[str, Any]] = {
    "as it was": {},
    "windowed": {"window": 20, "eidetic": 4, "chunk": 5},
    "short window": {"window": 6, "sinks": 1},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "8 bits": {"q_bits": 8, "q_group_size": 32},
    "4 bits": {"q_bits": 4, "q_group_size": 32},
    "4 bits, bfloat16": {"q_bits": 4, "q_group_size": 32, "dtype": "bfloat16"},
}


@pytest.fixture(scope="module", params=["mlx", "torch"])
def load(request: pytest.FixtureRequest) -> Callable[..., Any]:
    pytest.importorskip("mlx.core" if request.param == "mlx" else "torch")
    return import_module(f"bmojo_edge.{request.param}").load


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_verified_load(kind: str, case: str, load: Callable[..., Any], tmp_path: Path) -> None:
    fields = {"head_dim": 16, "tie_word_embeddings": True} if kind == "qwen3" else {}
    model = foreign.model(kind, hidden_size=64, intermediate_size=96, **fields)
    options = {"dtype": "float32", **OPTIONS[case]}
    out = convert(foreign.save(model, tmp_path / "source"), tmp_path / "out", **options)
    assert load(out, verify=True).config.dtype == options["dtype"]
    weights = load_file(out / "model.safetensors")
    name = "layers.1.mlp_norm.weight"
    weights[name] = (weights[name].astype(np.float32) * 3).astype(weights[name].dtype)
    save_file(weights, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"golden\.safetensors: logits differ"):
        load(out, verify=True)
    load(out)
