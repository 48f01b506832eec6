"""Checkpoints of transformers, state-space models first: converted logits equal the source's on oracle and twins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bmojo_convert import convert, hf
from bmojo_edge import checkpoint, golden
from bmojo_edge.special_cases import special_case
from tests.parity import engines, foreign

ROUNDING = 5e-6  # float32 on both sides, over recurrences of up to 300 steps
LENGTHS = (1, 63, 65, 300)  # across the borders of chunks in transformers and in the twins

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mamba": ("mamba", {}),
    "mamba, biases, own head": (
        "mamba",
        {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "time_step_rank": 5, "conv_kernel": 3},
    ),
    "mamba2": ("mamba2", {}),
    "mamba2, biases, tied, dt limits": (
        "mamba2",
        {"use_bias": True, "tie_word_embeddings": True, "n_groups": 4, "time_step_limit": (0.05, 0.2)},
    ),
    "mamba2, no conv bias, wide": ("mamba2", {"use_conv_bias": False, "expand": 3, "num_heads": 12, "conv_kernel": 2}),
    "jamba": ("jamba", {}),
    "jamba, tied, biases": (
        "jamba",
        {"tie_word_embeddings": True, "mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": 4},
    ),
    "jamba, experts": ("jamba", MOE),
    "jamba, experts everywhere": (
        "jamba",
        {**MOE, "num_experts_per_tok": 1, "expert_layer_period": 1, "expert_layer_offset": 0, "mamba_expand": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    """Whole, in pieces and token by token, with the state carried."""
    kind, fields = CASES[case]
    model = foreign.model(kind, **fields)
    out = convert(foreign.save(model, tmp_path / "source"), tmp_path / "out", dtype="float32")
    made = golden.read(out)
    assert made is not None
    assert made.author.startswith("transformers")
    texts = {length: foreign.tokens(length) for length in LENGTHS}
    refs = {length: foreign.logits_of(model, ids) for length, ids in texts.items()}
    for engine in engines.NAMES:
        with engines.opened(engine, out) as forward:
            for length, ids in texts.items():
                if engine == "oracle" and length == 63:
                    continue
                assert golden.rms_ratio(forward(ids, None)[0], refs[length]) < ROUNDING, (engine, length)
            for pieces in ([7, 1, 60], [1]) if engine != "oracle" else ([7, 1, 60],):
                got = engines.in_pieces(forward, texts[65], pieces)
                assert golden.rms_ratio(got, refs[65]) < ROUNDING, (engine, pieces)


def test_windowed(tmp_path: Path) -> None:
    """A window that holds the whole text changes nothing; a shorter one bounds the memory."""
    model = foreign.model("jamba", **MOE)
    source = foreign.save(model, tmp_path / "source")
    out = convert(source, tmp_path / "long", window=80, eidetic=3, dtype="float32")
    ref = foreign.logits_of(model, foreign.tokens(65))
    for engine in engines.NAMES:
        with engines.opened(engine, out) as forward:
            got = engines.in_pieces(forward, foreign.tokens(65), [7, 1, 60])
            assert golden.rms_ratio(got, ref) < ROUNDING, engine
    config, _ = checkpoint.read(convert(source, tmp_path / "short", window=8))
    assert config.layer_types == ("mamba", "bmojo", "mamba", "mamba")
    assert (config.window, config.n_sinks, config.n_fading, config.ssm_layers) == (8, 4, 0, ())
    assert config.growing_layers == ()


def test_special_cases(tmp_path: Path) -> None:
    """What a converted folder says that it is."""
    for kind, name in (
        ("mamba", "Mamba"),
        ("mamba2", "Mamba-2"),
        ("jamba", "hybrid of 3 Mamba layers, 1 Transformer layer"),
    ):
        source = foreign.save(foreign.model(kind, **(MOE if kind == "jamba" else {})), tmp_path / kind)
        config, weights = checkpoint.read(convert(source, tmp_path / f"{kind} out"))
        assert special_case(config) == name
        assert config.growing_layers == ((1,) if kind == "jamba" else ())
        assert (config.n_fading, config.rope_theta) == (0, None)
        if kind == "jamba":
            assert config.experts is not None
            assert (config.experts.n, config.experts.per_token, config.experts.layers) == (4, 2, (1, 3))
            assert weights["layers.1.mlp.experts.up_proj.weight"].shape == (4, 72, 48)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "jamba"])
def test_defaults_of_the_class(kind: str, tmp_path: Path) -> None:
    """A config.json that leaves out what the class of transformers assumes."""
    fields = {
        "mamba": {"state_size": 16},
        "mamba2": {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 8, "state_size": 128},
        "jamba": {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 16,
                  "attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16, "intermediate_size": 8},
    }[kind]  # fmt: skip
    model = foreign.model(kind, **fields)
    source = foreign.save(model, tmp_path / "source")
    content = json.loads((source / "config.json").read_text())
    sizes = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_heads",
             "head_dim", "num_attention_heads", "num_key_value_heads")  # fmt: skip
    (source / "config.json").write_text(json.dumps({name: content[name] for name in sizes if name in content}))
    assert foreign.distance(model, convert(source, tmp_path / "out", dtype="float32"), 20) < ROUNDING


def test_other_spellings(tmp_path: Path) -> None:
    """`Infinity` and floats in config.json; convolutions as MLX lays them out."""
    model = foreign.model("mamba2")
    source = foreign.save(model, tmp_path / "source")
    content = json.loads((source / "config.json").read_text())
    content |= {"time_step_limit": [0.0, float("inf")], "expand": 2.0}
    (source / "config.json").write_text(json.dumps(content))
    weights = load_file(source / "model.safetensors")
    weights = {n: np.ascontiguousarray(w.swapaxes(1, 2)) if "conv1d.weight" in n else w for n, w in weights.items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "mlx"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "_LARGEST_WHOLE", 0)  # transformers does not read MLX's layout
        out = convert(source, tmp_path / "out", dtype="float32")
    assert foreign.distance(model, out, 20) < ROUNDING


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("mamba", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("mamba", {"expand": 1.5}, r"expand 1\.5"),
        ("mamba", {"state_size": "x"}, "state_size is missing or no integer"),
        ("mamba", {"state_size": 6}, r"tensor 'backbone\.layers\.0\.mixer\..*' has shape"),
        ("mamba", {"use_bias": True}, r"tensor 'backbone\.layers\.0\.mixer\.in_proj\.bias' is missing"),
        ("mamba2", {"time_step_limit": [0.0]}, "time_step_limit must be two numbers"),
        ("mamba2", {"num_heads": 7}, r"ssm\.expand"),
        ("jamba", {"sliding_window": 7}, "sliding_window"),
        ("jamba", {"attn_layer_offset": "1"}, "attn_layer_offset is missing or no integer"),
        ("jamba", {"attn_layer_offset": 2}, "tensor 'model.layers.1.mamba.* is missing"),
        ("jamba", {"num_experts": 3}, "left over, such as 'model.layers.1.feed_forward.experts.3"),
        ("jamba", {"num_experts": 5}, r"tensor 'model\.layers\.1\.feed_forward\..*' (is missing|has shape)"),
    ],
)
def test_refused(kind: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = foreign.save(foreign.model(kind, **(MOE if kind == "jamba" else {})), tmp_path / "source")
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, **fields}))
    if fields.get("num_experts") == 3:  # the router's rows agree, its experts do not
        weights = load_file(source / "model.safetensors")
        weights = {n: w[:3].copy() if "router" in n else w for n, w in weights.items()}
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(checkpoint.CheckpointError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
