"""Converting needs memory for a tensor and a layer, not for the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity import foreign

_SCRIPT = """
import resource, sys
from bmojo_convert import convert, hf
hf._LARGEST_WHOLE = 0  # as for a model too large for transformers
scale = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
convert(sys.argv[1], sys.argv[2], dtype="float32", q_bits=8 if sys.argv[3] == "8" else None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale - before)
"""


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
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, source, tmp_path / "out", bits],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 150e6 + 3 * largest < size / 2
