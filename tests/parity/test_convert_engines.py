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
from bmojo_edge import checkpoint
from bmojo_edge.checkpoint import CheckpointError
from tests.parity import foreign
from tests.parity import hybrid_model_factory as factory

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


SSMS: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 64},
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16},
    "jamba": {
        "hidden_size": 64, "intermediate_size": 96, "num_experts": 4, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "B'MOJO-F with mamba2": {"pattern": "*-BMF-M2", "bmojo_config": {"tie_attn_weights": False}},
    "B'MOJO-F with gdn": {"pattern": "SWA-BMF-GDN", "kind": "llama", "bmojo_config": {"ssm_mixer": "gdn"}},
    "B'MOJO-F with gka": {"pattern": "BMF-GKA", "kind": "qwen2", "bmojo_config": {"ssm_mixer": "gka"}},
}  # fmt: skip


@pytest.mark.parametrize("case", ["8 bits", "4 bits", "float16"])
@pytest.mark.parametrize("kind", SSMS)
def test_verified_load_of_state_space_models(
    kind: str, case: str, load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantised and in half precision, experts and projections of every mixer."""
    if kind in foreign._CLASSES:
        source = foreign.save(foreign.model(kind, **SSMS[kind]), tmp_path / "source")
    else:
        for name, size in {"D": 64, "FF": 96, "P": 16}.items():
            monkeypatch.setattr(factory, name, size)
        c = factory.config(**SSMS[kind])
        source = factory.save(tmp_path / "source", c, factory.tensors(c))
    options = {"dtype": "float32", **OPTIONS[case]}
    out = convert(source, tmp_path / "out", **options)
    assert load(out, verify=True).config.dtype == options["dtype"]
    assert (checkpoint.read(out)[0].quantization is None) == (case == "float16")
