"""Conformance: unmodified kernels of mlx-lm, made through the installed harness, equal mlx-lm's plain operations."""

from collections.abc import Iterator
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="the harness stands in for MLX's own function")
gated_delta: Any = pytest.importorskip("mlx_lm.models.gated_delta", reason="mlx-lm's kernels are what is run")
ssm: Any = pytest.importorskip("mlx_lm.models.ssm", reason="mlx-lm's kernels are what is run")

from metal_kernels.host import ORDERS, Run  # noqa: E402
from metal_kernels.host.install import installed  # noqa: E402

pytestmark = pytest.mark.usefixtures("harness", "kernels")

TOLERANCES = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.fixture(params=ORDERS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """mlx-lm's kernels, as it would make them had it found a Metal device."""
    with installed(Run(mode="check", order=request.param)):
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(ssm, "_ssm_kernel", ssm.make_ssm_kernel())
        monkeypatch.setattr(gated_delta, "_gated_delta_kernel", gated_delta._make_gated_delta_kernel())
        xtree = gated_delta._make_gated_delta_kernel_xtree()
        monkeypatch.setattr(gated_delta, "_gated_delta_kernel_xtree", xtree)
        yield


def normal(*shape: int, seed: int, dtype: Any = None) -> Any:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype or mx.float32)


def error_ratio(got: Any, ref: Any) -> float:
    difference = got.astype(mx.float32) - ref.astype(mx.float32)
    return mx.sqrt(mx.sum(difference**2) / mx.sum(ref.astype(mx.float32) ** 2)).item()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_mamba2_step(dtype: str) -> None:
    batch, heads, head_dim, d_state, groups = 2, 4, 16, 64, 2
    kind = getattr(mx, dtype)
    x = normal(batch, 1, heads, head_dim, seed=0, dtype=kind)
    b, c = (normal(batch, 1, groups, d_state, seed=seed, dtype=kind) for seed in (1, 2))
    a_log, d, dt_bias = (normal(heads, seed=seed) for seed in (3, 4, 5))
    dt, state = normal(batch, 1, heads, seed=6, dtype=kind), normal(batch, heads, head_dim, d_state, seed=7)
    limits = (0.001, 100.0)
    y, new_state = ssm.ssm_update_kernel(x, a_log, b, c, d.astype(kind), dt, dt_bias, state, limits)
    wide = [array.astype(mx.float32) for array in (x, a_log, b, c, d.astype(kind), dt)]
    ref_y, ref_state = ssm.ssm_attn(*wide, dt_bias, state, limits)
    assert y.dtype == kind
    assert error_ratio(y, ref_y) < TOLERANCES[dtype]
    assert error_ratio(new_state, ref_state) < TOLERANCES["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gated_delta(dtype: str) -> None:
    batch, steps, k_heads, v_heads, k_dim, v_dim = 2, 5, 2, 4, 64, 12
    kind = getattr(mx, dtype)
    q, k = (0.1 * normal(batch, steps, k_heads, k_dim, seed=seed, dtype=kind) for seed in (0, 1))
    v = normal(batch, steps, v_heads, v_dim, seed=2, dtype=kind)
    gate = mx.sigmoid(normal(batch, steps, v_heads, seed=3))
    beta = mx.sigmoid(normal(batch, steps, v_heads, seed=4)).astype(kind)
    state = normal(batch, v_heads, v_dim, k_dim, seed=5)
    inputs = (q, k, v, gate, beta, state)
    y, new_state = gated_delta.gated_delta_kernel_unpacked(*inputs)
    ref_y, ref_state = gated_delta.gated_delta_ops(*(array.astype(mx.float32) for array in inputs))
    assert error_ratio(y, ref_y) < TOLERANCES[dtype]
    assert error_ratio(new_state, ref_state) < TOLERANCES["float32"]
    # mlx-lm pins the order of simd_sum to this tree, "the same tree simd_sum lowers to" on Apple's GPUs.
    tree_y, tree_state = gated_delta.gated_delta_kernel_xtree(*inputs)
    assert mx.array_equal(y, tree_y)
    assert mx.array_equal(new_state, tree_state)
