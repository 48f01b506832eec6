"""Llama-family checkpoints of transformers: converted logits equal the source's to float32 rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from bmojo_convert import convert
from bmojo_edge import checkpoint, golden
from tests.parity import foreign

# float32 in transformers against the float64 oracle.
ROUNDING = 2e-6

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama, head_dim": ("llama", {"head_dim": 20}),
    "llama, llama3": ("llama", {"rope_parameters": foreign.LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": foreign.LINEAR}),
    "llama, yarn": ("llama", {"rope_parameters": foreign.YARN}),
    "llama, yarn with everything": (
        "llama",
        {
            "rope_parameters": foreign.YARN
            | {"beta_fast": 20.0, "beta_slow": 0.5, "mscale": 0.8, "mscale_all_dim": 1.1, "truncate": False}
        },
    ),
    "llama, yarn attention factor": ("llama", {"rope_parameters": foreign.YARN | {"attention_factor": 1.3}}),
    "llama, theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 7}),
    "mistral, window of one": ("mistral", {"sliding_window": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, sliding from layer 1": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2, window not in use": ("qwen2", {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": foreign.YARN}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, layer types": (
        "qwen3",
        {
            "head_dim": 12,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    model = foreign.model(kind, **fields)
    out = convert(foreign.save(model, tmp_path / "source"), tmp_path / "out", dtype="float32")
    for length in (1, 16, 75):
        assert foreign.distance(model, out, length) < ROUNDING
    config, _ = checkpoint.read(out)
    assert set(config.layer_types) == {"attention"}
    made = golden.read(out)
    assert made is not None
    assert made.author.startswith("transformers")
    assert made.tokens.shape == (16,)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_windowed(kind: str, tmp_path: Path) -> None:
    """A window that holds the whole text changes nothing; a shorter one without sinks is a sliding window."""
    model = foreign.model(kind, **({"head_dim": 16} if kind == "qwen3" else {}))
    source = foreign.save(model, tmp_path / "source")
    out = convert(source, tmp_path / "long", window=64, eidetic=3, dtype="float32")
    config, _ = checkpoint.read(out)
    assert set(config.layer_types) == {"bmojo"}
    assert (config.window, config.n_sinks, config.n_eidetic, config.n_fading) == (64, 4, 3, 0)
    assert config.ssm is None
    assert foreign.distance(model, out, 64) < ROUNDING
    convert(source, tmp_path / "short", window=7, sinks=0, chunk=3, dtype="float32")
    sliding = foreign.model("mistral", sliding_window=7) if kind == "llama" else None
    if sliding is not None:
        sliding.load_state_dict(model.state_dict())
        assert foreign.distance(sliding, tmp_path / "short", 40) < ROUNDING
    assert golden.read(tmp_path / "short").author.startswith("bmojo_edge.reference")  # pyright: ignore


def test_window_on_a_sliding_window_model(tmp_path: Path) -> None:
    """No layer sees farther than it was trained to; layers that see less than the window stay as they are."""
    mistral = foreign.save(foreign.model("mistral", sliding_window=20), tmp_path / "mistral")
    for asked, window in ((8, 8), (64, 20)):
        config, _ = checkpoint.read(convert(mistral, tmp_path / f"m{asked}", window=asked, sinks=2))
        assert (set(config.layer_types), config.window, config.n_sinks) == ({"bmojo"}, window, 2)
    mixed = foreign.model("qwen2", use_sliding_window=True, sliding_window=20, max_window_layers=1)
    source = foreign.save(mixed, tmp_path / "qwen2")
    config, _ = checkpoint.read(convert(source, tmp_path / "q64", window=64))
    assert config.layer_types == ("bmojo", "attention", "attention")
    assert config.attention_window == (None, 20, 20)
    assert not config.growing_layers
    config, _ = checkpoint.read(convert(source, tmp_path / "q8", window=8))
    assert (set(config.layer_types), config.window) == ({"bmojo"}, 8)


def test_older_rope_fields(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` with `type`, as transformers 4 wrote them."""
    model = foreign.model("llama", rope_parameters=foreign.YARN)
    source = foreign.save(model, tmp_path / "source")
    content = json.loads((source / "config.json").read_text())
    rope = content.pop("rope_parameters")
    content["rope_theta"] = rope.pop("rope_theta")
    content["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    (source / "config.json").write_text(json.dumps(content))
    assert foreign.distance(model, convert(source, tmp_path / "out", dtype="float32"), 75) < ROUNDING


def test_defaults_of_the_class(tmp_path: Path) -> None:
    """A config.json that leaves out what the class of transformers assumes."""
    model = foreign.model("llama", num_key_value_heads=4)
    source = foreign.save(model, tmp_path / "source")
    content = json.loads((source / "config.json").read_text())
    for name in ("rope_parameters", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "mlp_bias"):
        content.pop(name, None)
    (source / "config.json").write_text(json.dumps(content))
    assert foreign.distance(model, convert(source, tmp_path / "out", dtype="float32"), 20) < ROUNDING


def test_shards_in_and_out(tmp_path: Path) -> None:
    model = foreign.model("qwen3", head_dim=16)
    source = foreign.save(model, tmp_path / "source", max_shard_size="40KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    seen: list[tuple[str, int, int]] = []
    out = convert(
        source, tmp_path / "out", dtype="float32", shard_bytes=50_000, progress=lambda *step: seen.append(step)
    )
    shards = sorted(path.name for path in out.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(path.stat().st_size < 55_000 for path in out.glob("model-*.safetensors"))
    assert foreign.distance(model, out, 30) < ROUNDING
    done = [step for step in seen if step[0] == "weights"]
    assert done[-1][1] == done[-1][2] == sum(p.numel() for p in model.parameters())
    assert [step[1] for step in done] == sorted(step[1] for step in done)
    assert seen[-1] == ("golden", 1, 1)


@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "limit"),
    [("float16", torch.float32, 2e-3), ("bfloat16", torch.float32, 2e-2), ("float32", torch.bfloat16, 2e-2)],
)
def test_dtypes(dtype: str, torch_dtype: torch.dtype, limit: float, tmp_path: Path) -> None:
    model = foreign.model("llama")
    source = foreign.save(model.to(torch_dtype), tmp_path / "source")
    out = convert(source, tmp_path / "out", dtype=dtype)
    config, weights = checkpoint.read(out)
    assert config.dtype == dtype
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    assert all(weights[name].dtype == numpy_dtype for name in weights)
    assert 0 < foreign.distance(model.float(), out, 20) < limit or torch_dtype != torch.float32


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.05), (4, 0.6)])
@pytest.mark.parametrize("group_size", [32, 64])
def test_quantised(bits: int, limit: float, group_size: int, tmp_path: Path) -> None:
    model = foreign.model("llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    source = foreign.save(model, tmp_path / "source")
    out = convert(source, tmp_path / "out", dtype="float32", q_bits=bits, q_group_size=group_size)
    config, weights = checkpoint.read(out)
    assert config.quantization is not None
    assert (config.quantization.bits, config.quantization.group_size) == (bits, group_size)
    # Rows of 96 are not whole groups of 64: left as they are.
    assert ("layers.0.mlp.down_proj.scales" in weights) == (group_size == 32)
    assert weights["layers.0.mixer.q_proj.weight"].dtype == np.uint32
    assert weights["layers.0.mixer.q_proj.scales"].dtype == np.float32
    assert foreign.distance(model, out, 20) < limit
    stored = golden.read(out)
    assert stored is not None
    assert stored.quantized_logits is not None
    got = foreign.converted_logits(out, stored.tokens[None])[0]
    assert golden.rms_ratio(got, stored.quantized_logits) < 1e-5
    content = json.loads((out / "config.json").read_text())
    assert content["quantization_config"] == content["quantization"]
    # And back: ours to ours, quantised to plain.
    again = convert(out, tmp_path / "again", dtype="float32")
    assert foreign.distance(model, again, 20) == pytest.approx(foreign.distance(model, out, 20), rel=1e-3)


def test_sources_that_mlx_lm_quantised(tmp_path: Path) -> None:
    """A folder mlx-lm has quantised is read as the values it stands for."""
    from bmojo_edge.config import Quantization
    from bmojo_edge.quantize import dequantize, quantize

    model = foreign.model("llama", hidden_size=64, intermediate_size=128)
    source = foreign.save(model, tmp_path / "source")
    q, stored = Quantization(32, 4), {}
    state = model.state_dict()
    for name, array in load_file(source / "model.safetensors").items():
        if array.ndim == 2:
            stem = name.removesuffix(".weight")
            packed = quantize(array, q)
            stored |= {name: packed[0], f"{stem}.scales": packed[1], f"{stem}.biases": packed[2]}
            state[name] = torch.from_numpy(dequantize(*packed, q))
        else:
            stored[name] = array
    save_file(stored, source / "model.safetensors", metadata={"format": "mlx"})
    content = json.loads((source / "config.json").read_text())
    content["quantization"] = content["quantization_config"] = {"group_size": 32, "bits": 4, "mode": "affine"}
    (source / "config.json").write_text(json.dumps(content))
    model.load_state_dict(state)
    assert foreign.distance(model, convert(source, tmp_path / "out", dtype="float32"), 20) < ROUNDING


def test_tied_head_that_is_stored_too(tmp_path: Path) -> None:
    """Both names with one value are tied; with two values transformers does not tie, and neither do we."""
    model = foreign.model("llama", tie_word_embeddings=True)
    source = foreign.save(model, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    embed = weights["model.embed_tokens.weight"]
    for n, head in enumerate((embed, embed[::-1].copy())):
        save_file({**weights, "lm_head.weight": head}, source / "model.safetensors", metadata={"format": "pt"})
        out = convert(source, tmp_path / f"out{n}", dtype="float32")
        config, _ = checkpoint.read(out)
        assert config.tie_embeddings == (n == 0)
        assert golden.read(out).author.startswith("transformers")  # pyright: ignore
    save_file(
        {("lm_head.weight" if "embed" in name else name): array for name, array in weights.items()},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert foreign.distance(model, convert(source, tmp_path / "out2", dtype="float32"), 20) < ROUNDING


def test_every_end_of_sequence_is_kept(tmp_path: Path) -> None:
    source = foreign.save(foreign.model("llama"), tmp_path / "source")
    generation = {"eos_token_id": [5, 7], "bos_token_id": 3, "temperature": 0.6, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (source / "README.md").write_text("not ours to copy")
    out = convert(source, tmp_path / "out")
    kept = json.loads((out / "generation_config.json").read_text())
    assert kept == {**generation, "eos_token_id": [5, 7, 2], "pad_token_id": kept.get("pad_token_id")} or kept == {
        **generation,
        "eos_token_id": [5, 7, 2],
    }
    assert (out / "tokenizer_config.json").read_text() == '{"chat_template": "x"}'
    assert not (out / "README.md").exists()


def test_old_checkpoints_with_rotary_frequencies(tmp_path: Path) -> None:
    model = foreign.model("llama")
    source = foreign.save(model, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert foreign.distance(model, convert(source, tmp_path / "out", dtype="float32"), 20) < ROUNDING
