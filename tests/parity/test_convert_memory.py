"""Converting needs memory for a tensor and a layer, not for the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bmojo_edge import checkpoint
from tests.parity import foreign
from tests.parity import hybrid_model_factory as factory

_SCRIPT = """
import re, resource, sys
from pathlib import Path
from bmojo_convert import convert, hf

def peak():
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss starts at that of the process which started this one
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

hf._LARGEST_WHOLE = 0  # as for a model too large for transformers
before = peak()
convert(sys.argv[1], sys.argv[2], dtype="float32", q_bits=8 if sys.argv[3] == "8" else None)
print(peak() - before)
"""


def _run(source: Path, out: Path, bits: str) -> int:
    """Bytes that converting takes beyond the interpreter and its imports, at most."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, source, out, bits], env=env, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["", "8"])
def test_peak(bits: str, tmp_path: Path) -> None:
    model = foreign.model(
        "llama", vocab_size=8192, hidden_size=768, intermediate_size=2304, num_hidden_layers=24, num_attention_heads=12
    )
    size = 4 * sum(p.numel() for p in model.parameters())
    source = foreign.save(model, tmp_path / "source", max_shard_size="100MB")
    largest = 4 * max(p.numel() for p in model.parameters())
    del model
    assert size > 600e6
    assert _run(source, tmp_path / "out", bits) < 150e6 + 3 * largest < size / 2


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["", "8"])
def test_peak_of_a_large_hybrid(bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 GB in shards, with every kind of layer, plain and quantised on the way."""
    for name, size in {"D": 1024, "FF": 4096, "V": 16_384, "H": 16, "G": 4, "P": 64}.items():
        monkeypatch.setattr(factory, name, size)
    c = factory.config("-".join(["*-BMF-M2-SWA"] * 8), bmojo_config={"window_size": 2048})
    source, rng, size = tmp_path / "source", np.random.default_rng(0), 0
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in factory.shapes(c).items():
        layers.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})[name] = shape
    where = {}
    for n, (_, shapes) in enumerate(layers.items(), start=1):
        file = f"model-{n:05d}-of-{len(layers):05d}.safetensors"
        shard = {name: 0.02 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        source.mkdir(exist_ok=True)
        save_file(shard, source / file, metadata={"format": "pt"})
        size += sum(tensor.nbytes for tensor in shard.values())
        where |= dict.fromkeys(shard, file)
    (source / "config.json").write_text(json.dumps(c))
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    assert size > 2e9
    peak = _run(source, tmp_path / "out", bits)
    config, weights = checkpoint.read(tmp_path / "out")
    assert len(config.layer_types) == 32
    assert ("layers.0.mixer.q_proj.scales" in weights) == bool(bits)
    print(f"{size / 1e9:.2f} GB, {bits or 'no'} bits: {peak / 1e6:.0f} MB")
    assert 20e6 < peak < 1.2e9
