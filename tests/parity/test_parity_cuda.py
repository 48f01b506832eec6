"""A record made on an NVIDIA GPU, with its kernels, holds on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from bmojo_edge import checkpoint, parity
from bmojo_edge.config import Config
from bmojo_edge.parity_check import check
from tests.absent import absent
from tests.helpers import random_weights

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_record_from_the_gpu_holds_on_the_cpu(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        absent("parity on a GPU", "there is no CUDA device", expected=False)
    from bmojo_edge.torch.parity import Observed

    config = Config.preset("tiny", vocab_size=512, rope_theta=1e4, n_sinks=4)
    checkpoint.save(tmp_path / "model", config.replace(dtype=dtype), random_weights(config))
    record = parity.record(tmp_path / "model", Observed(tmp_path / "model", "cuda"))
    assert record.engine["kernels"].startswith("Triton")
    comparison = check(tmp_path / "model", record, Observed(tmp_path / "model"))
    assert comparison.failures == []
