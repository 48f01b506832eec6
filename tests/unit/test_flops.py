"""Operations of training, against formulas written out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from bmojo_edge.config import Config
from bmojo_edge.flops import peak_flops, training_flops_per_token
from bmojo_edge.parameters import parameter_shapes

BASE: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "d_ff": 24, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4}


def products(config: Config) -> int:
    """Numbers in the matrices of all layers."""
    found = parameter_shapes(config).items()
    return sum(a * b for name, (a, b, *_) in ((n, (*s, 1)) for n, s in found if len(s) == 2) if "layers" in name)


def test_a_transformer_takes_six_operations_a_parameter_and_attends_to_half() -> None:
    config = Config(**BASE, layer_types=("attention",) * 3)
    weights = 3 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24) + 50 * 16
    assert products(config) + 50 * 16 == weights
    mean_keys = (100 + 1) / 2
    assert training_flops_per_token(config, 100) == pytest.approx(6 * weights + 3 * 3 * 4 * 16 * mean_keys)


def test_a_window_bounds_what_is_seen() -> None:
    config = Config(**BASE, layer_types=("attention",), attention_window=10)
    long, longer = (training_flops_per_token(config, length) for length in (10_000, 100_000))
    assert longer == pytest.approx(long, rel=1e-3)
    assert longer == pytest.approx(6 * (products(config) + 800) + 3 * 4 * 16 * 10, rel=1e-3)


def test_a_bmojo_layer_reads_its_memories_and_projects_twice() -> None:
    sizes: dict[str, Any] = {"window": 8, "n_fading": 4, "n_eidetic": 6, "n_sinks": 2, "chunk": 4}
    ssm: Any = {"kind": "mamba", "d_state": 3, "d_conv": 2, "expand": 2, "dt_rank": 2}
    config = Config(**BASE, **sizes, ssm=ssm, layer_types=("bmojo",))
    linear = 2 * (products(config) - 32 * 3 + 2 * 16 * 8 + 800)  # A_log is no matrix; keys and values of y as well
    seen = 8 + 4 + 6 + 2
    want = 3 * (linear + 6 * 32 * 3 + 4 * 16 * seen)
    assert training_flops_per_token(config, 100_000) == pytest.approx(want, rel=1e-3)


def test_only_chosen_experts_count() -> None:
    dense = Config(**BASE, layer_types=("attention",))
    experts: Any = {"n": 8, "per_token": 2, "layers": [0]}
    mixed = Config(**BASE, layer_types=("attention",), experts=experts)
    more = training_flops_per_token(mixed, 10) - training_flops_per_token(dense, 10)
    assert more == pytest.approx(6 * (3 * 16 * 24 + 8 * 16))


def test_devices_by_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("cpu") is None
