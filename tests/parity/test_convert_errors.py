"""What cannot be converted is refused by name, and nothing is written; what is cut off leaves nothing that loads."""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from bmojo_convert import convert
from bmojo_edge import checkpoint, golden
from bmojo_edge.checkpoint import CheckpointError
from tests.parity import foreign
from tests.parity import hybrid_model_factory as factory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return foreign.save(foreign.model("llama"), tmp_path / "source")


def _refused(source: Path | str, message: str, tmp_path: Path, **options: Any) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama", {"model_type": "gpt2"}, r"config\.json: model_type 'gpt2' is not supported"),
        ("llama", {"model_type": None}, r"config\.json: model_type None is not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type 'su'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type 'longrope'"),
        ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "rope_type 'mrope'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "new": 1}}, "rope_scaling.new"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention", "x"]}, "layer_types: 'chunked_attention'"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types lists 1 layers"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding_window is not set"),
        ("llama", {"vocab_size": None}, "vocab_size is missing"),
        ("llama", {"num_key_value_heads": 3}, "n_kv_heads: must divide"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config: 'gptq'"),
    ],
)
def test_unsupported_config(kind: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = foreign.save(foreign.model(kind), tmp_path / "source")
    _edit(source / "config.json", lambda content: content.update(fields))
    _refused(source, message, tmp_path)


def test_broken_config(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text("{")
    _refused(source, r"config\.json: not valid JSON", tmp_path)
    (source / "config.json").unlink()
    _refused(source, r"config\.json: file is missing", tmp_path)


# --- tensors --------------------------------------------------------------------------------------------------------


def _replace(source: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.1.self_attn.k_proj.weight"


def test_missing_extra_and_misshapen_tensors(source: Path, tmp_path: Path) -> None:
    def swap(weights: dict[str, np.ndarray]) -> None:
        weights[NAME] = np.ascontiguousarray(weights[NAME].T)

    def integers(weights: dict[str, np.ndarray]) -> None:
        weights[NAME] = weights[NAME].astype(np.int8)

    original = (source / "model.safetensors").read_bytes()
    for change, message in (
        (lambda w: w.pop(NAME), f"tensor '{NAME}' is missing"),
        (lambda w: w.pop("lm_head.weight"), "tensor 'lm_head.weight' is missing"),
        (lambda w: w.update({"model.layers.0.surprise": np.ones(3)}), "left over, such as 'model.layers.0.surprise'"),
        (lambda w: w.update({"model.layers.3.mlp.up_proj.weight": np.ones(3)}), "left over"),
        (swap, rf"tensor '{NAME}' has shape \(48, 24\), expected \(24, 48\)"),
        (integers, f"tensor '{NAME}' is int8"),
    ):
        (source / "model.safetensors").write_bytes(original)
        _replace(source, change)
        _refused(source, message, tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated(kept: float, source: Path, tmp_path: Path) -> None:
    path = source / "model.safetensors"
    os.truncate(path, int(kept * path.stat().st_size) if isinstance(kept, float) else kept)
    _refused(source, r"model\.safetensors: truncated or damaged", tmp_path)


def test_shards(tmp_path: Path) -> None:
    source = foreign.save(foreign.model("llama"), tmp_path / "source", max_shard_size="60KB")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = sorted(source.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.unlink()
    _refused(source, f"{shard.name}: file is missing", tmp_path)
    shard.write_bytes(whole[:-8])
    _refused(source, f"{shard.name}: truncated", tmp_path)
    shard.write_bytes(whole)
    for change, message in (
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "outside the folder"),
        ({"weight_map": {**content["weight_map"], "b": shard.name}}, "tensor 'b' is missing"),
        ({"weight_map": 3}, "weight_map is missing or is no table"),
    ):
        index.write_text(json.dumps({**content, **change}))
        _refused(source, message, tmp_path)


def test_overflow_of_float16(source: Path, tmp_path: Path) -> None:
    _replace(source, lambda w: w.update({NAME: w[NAME] + np.float32(1e6)}))
    _refused(source, r"mixer\.k_proj\.weight.* do not fit float16; use bfloat16", tmp_path, dtype="float16")


def test_not_finite(source: Path, tmp_path: Path) -> None:
    _replace(source, lambda w: w[NAME].__setitem__((0, 0), np.nan))
    with np.errstate(invalid="ignore"):
        _refused(source, "logits differ.*RMS ratio nan", tmp_path)


# --- pickles --------------------------------------------------------------------------------------------------------


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_not_opened(source: Path, tmp_path: Path) -> None:
    exploded = tmp_path / "exploded"
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(exploded)))
    _refused(source, r"only pickled weights \(pytorch_model\.bin\)", tmp_path)
    _refused(source / "pytorch_model.bin", "pickled weights can run code", tmp_path)
    torch.save({"config": {}, "weights": _Bomb(exploded)}, tmp_path / "model.pt")
    _refused(tmp_path / "model.pt", r"model\.pt: refused: holds more than tensors", tmp_path)
    (tmp_path / "model.pt").write_bytes(pickle.dumps(_Bomb(exploded)))
    _refused(tmp_path / "model.pt", r"model\.pt: ", tmp_path)
    assert not exploded.exists()


# --- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count = 8 is not understood"),
        ({"llama.rope.dimension_count": 6}, "llama.rope.dimension_count = 6 with heads of 12"),
        ({"llama.attention.value_length": 6}, "llama.attention.value_length = 6"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope' is not supported"),
        ({"llama.logit_scale": 2.0}, "llama.logit_scale = 2.0 is not understood"),
        ({"llama.attention.head_count_kv": [2, 2, 1]}, "values per layer are not supported"),
    ],
)
def test_unsupported_metadata(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = foreign.write_gguf(foreign.model("llama"), tmp_path / "m.gguf", metadata=metadata)
    _refused(source, rf"m\.gguf: .*{message}", tmp_path)


def test_gguf_architecture_and_tensors(tmp_path: Path) -> None:
    model = foreign.model("llama")
    path = foreign.write_gguf(model, tmp_path / "m.gguf", architecture="gemma")
    _refused(path, r"m\.gguf: general\.architecture 'gemma' is not supported; known are llama, qwen2, qwen3", tmp_path)
    path = foreign.write_gguf(model, path, only=lambda name: name != "blk.1.ffn_up.weight")
    _refused(path, r"tensor 'blk\.1\.ffn_up\.weight' is missing", tmp_path)
    path = foreign.write_gguf(foreign.model("qwen3", head_dim=12), path, architecture="llama")
    _refused(path, r"left over, such as 'blk\.0\.attn_k_norm\.weight'", tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 100, 0.3, 0.7, 0.999])
def test_gguf_truncated(kept: float, tmp_path: Path) -> None:
    path = foreign.write_gguf(foreign.model("llama"), tmp_path / "m.gguf")
    os.truncate(path, int(kept * path.stat().st_size) if isinstance(kept, float) else kept)
    _refused(path, r"m\.gguf: truncated", tmp_path)


# --- options and places ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": 4}, "sinks: needs a window"),
        ({"eidetic": 4}, "eidetic: needs a window"),
        ({"window": 0}, "window: must be at least 1"),
        ({"window": 8, "fading": 8}, "n_fading: must be 0 where ssm is null"),
        ({"window": 8, "chunk": 9}, "chunk: must be at most window"),
        ({"window": 8, "sinks": -1}, "n_sinks: must be at least 0"),
        ({"dtype": "float8"}, "dtype: must be one of"),
        ({"q_bits": 3}, "q_bits: must be 4 or 8"),
        ({"q_bits": 4, "q_group_size": 48}, "q_group_size: .*must be one of"),
    ],
)
def test_options(options: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    _refused(source, message, tmp_path, **options)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    _refused(tmp_path / "nothing", "nothing: no such file or folder", tmp_path)
    _refused("./some/dir", "no such file or folder", tmp_path)
    (tmp_path / "a.txt").touch()
    _refused(tmp_path / "a.txt", r"is neither a folder nor a \.gguf or \.pt file", tmp_path)
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "m.gguf").touch()
    _refused(tmp_path / "ggufs", r"file is missing; it holds GGUF files, give one of them, such as m\.gguf", tmp_path)


def test_hub_ids_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="owner/name: no such file or folder here, and the hub does not give it"):
        convert("owner/name", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_folders_are_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    convert(source, out, dtype="float32")  # an empty folder is no loss
    stamp = (out / "config.json").stat().st_mtime_ns
    with pytest.raises(CheckpointError, match="out: exists"):
        convert(source, out)
    assert (out / "config.json").stat().st_mtime_ns == stamp
    convert(source, out, dtype="float16", overwrite=True)
    assert checkpoint.read(out)[0].dtype == "float16"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt: is no part of a model and would be lost"):
        convert(source, out, overwrite=True)
    with pytest.raises(CheckpointError, match=r"is the source itself|is not a model folder of ours"):
        convert(source, source, overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="other: exists and is not a model folder of ours"):
        convert(source, other, overwrite=True)
    assert (other / "thesis.txt").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# --- the golden check -----------------------------------------------------------------------------------------------


def test_a_wrong_product_gets_no_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that goes wrong on its way to the disk is found by reading the product back."""
    write = checkpoint.TensorWriter.write

    def damaging(self: Any, name: str, array: np.ndarray) -> None:
        write(self, name, array[::-1] if name == "layers.1.mixer.k_proj.weight" else array)

    monkeypatch.setattr(checkpoint.TensorWriter, "write", damaging)
    for options in ({"dtype": "float32"}, {"dtype": "bfloat16"}):
        _refused(source, "out: logits differ from those of transformers", tmp_path, **options)


def test_a_misread_config_is_found(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle on our reading of the source must agree with transformers before anything is rounded."""
    from bmojo_convert import families

    monkeypatch.setattr(families, "from_huggingface", lambda content, where: (500.0, None))
    _refused(source, "source: logits differ from those of transformers", tmp_path, q_bits=4)


@pytest.mark.parametrize("options", [{}, {"q_bits": 4, "q_group_size": 32}])
def test_verify(options: dict[str, Any], tmp_path: Path) -> None:
    """`golden.check` accepts a sound folder and names the file of a damaged one, quantised or not."""
    model = foreign.model("llama", hidden_size=64, intermediate_size=96)
    out = convert(foreign.save(model, tmp_path / "source"), tmp_path / "out", dtype="float32", **options)

    def logits(tokens: np.ndarray) -> np.ndarray:
        return foreign.converted_logits(out, tokens)

    config, _ = checkpoint.read(out)
    ratio = golden.check(out, config, logits)
    assert ratio is not None
    assert ratio < 1e-5
    weights = load_file(out / "model.safetensors")
    weights["layers.2.mlp_norm.weight"] = weights["layers.2.mlp_norm.weight"] * np.float32(1.05)
    save_file(weights, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"golden\.safetensors: logits differ"):
        golden.check(out, config, logits)
    (out / "golden.safetensors").unlink()
    assert golden.check(out, config, logits) is None


# --- interruption ---------------------------------------------------------------------------------------------------

_SLOW = """
import sys, time
from bmojo_convert import convert
def progress(stage, done, total):
    print(stage, flush=True)
    time.sleep(60 if stage == sys.argv[3] else 0)
convert(sys.argv[1], sys.argv[2], dtype="float32", progress=progress)
"""


@pytest.mark.parametrize(
    ("stage", "end"), [("weights", signal.SIGKILL), ("golden", signal.SIGKILL), ("golden", signal.SIGINT)]
)
@pytest.mark.parametrize("kind", ["llama", "hybrid"])
def test_cut_off(kind: str, stage: str, end: signal.Signals, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    if kind == "llama":
        foreign.save(foreign.model("llama"), source)
    else:
        c = factory.config("*-BMF")
        factory.save(source, c, factory.tensors(c), shards=3)
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, source, out, stage],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if line.strip() == stage:
            break
    else:
        pytest.fail(process.stderr.read())
    time.sleep(0.1)
    process.send_signal(end)
    process.communicate()
    assert not out.exists()
    for left in tmp_path.iterdir():
        if left != source:
            assert end == signal.SIGKILL  # an interrupt cleans up after itself
            with pytest.raises(CheckpointError):
                checkpoint.read(left)
    convert(source, out, dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert checkpoint.read(out)[0].dtype == "float32"


def test_header_that_lies(source: Path, tmp_path: Path) -> None:
    """A header length beyond the file, and offsets that overlap, are damage and not an excuse to read elsewhere."""
    path = source / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 40) + whole[8:])
    _refused(source, r"model\.safetensors: truncated or damaged", tmp_path)
