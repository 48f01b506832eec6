"""Quantisation: MLX's own bits, and its own values back, without MLX."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmojo_edge.config import Quantization
from bmojo_edge.quantize import dequantize, dequantized, packed_shapes, quantize

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def _weights(dtype: str, shape: tuple[int, ...] = (24, 256)) -> np.ndarray:
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape) * rng.choice([1e-3, 0.02, 1.0, 30.0], (*shape[:-1], 1))
    flat = w.reshape(-1, shape[-1])
    flat[0], flat[1], flat[2, :64] = 0, flat[1, 0], -3  # nothing, one value, one group of one value
    flat[3], flat[4], flat[5] = np.abs(flat[3]), -np.abs(flat[4]), flat[5] * 1e-9
    return w.astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_bits_are_those_of_mlx(dtype: str, bits: int, group_size: int) -> None:
    mx = pytest.importorskip("mlx.core")
    w, q = _weights(dtype), Quantization(group_size, bits)
    got = quantize(w, q)
    ref = mx.quantize(
        mx.array(w.astype(np.float32)).astype(getattr(mx, dtype)), group_size=group_size, bits=bits, stream=mx.cpu
    )
    np.testing.assert_array_equal(got[0], np.array(ref[0]))
    for ours, theirs in zip(got[1:], ref[1:], strict=True):
        assert ours.dtype == w.dtype
        np.testing.assert_array_equal(ours.astype(np.float32), np.array(theirs.astype(mx.float32)))
    back = np.array(mx.dequantize(ref[0], *(x.astype(mx.float32) for x in ref[1:]), group_size=group_size, bits=bits))
    np.testing.assert_allclose(dequantize(*got, q), back, rtol=1e-6, atol=1e-6 * np.abs(back).max())


@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 64), (70_000, 64)])
def test_shapes(shape: tuple[int, ...]) -> None:
    q = Quantization(32, 4)
    w = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    packed, scales, biases = quantize(w, q)
    assert (packed.shape, scales.shape) == packed_shapes(shape, q)
    assert biases.shape == scales.shape
    back = dequantize(packed, scales, biases, q)
    assert (back.shape, back.dtype) == (shape, np.float32)
    # The near end may be cut by up to half a step more, for the far one and zero are exact.
    step = np.repeat(np.abs(scales), 32, axis=-1)
    assert (np.abs(back - w) <= 1.001 * step + 1e-6).all()


@given(
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from([32, 64]),
    st.integers(0, 255),
    st.floats(1e-3, 1e3),
    st.integers(0, 99),
)
def test_values_on_the_grid_come_back(bits: int, group_size: int, zero: int, step: float, seed: int) -> None:
    """Weights that are already scale * integer + bias, with both ends in use, survive to rounding."""
    q = np.random.default_rng(seed).integers(0, 2**bits, (3, 2 * group_size))
    q[:, ::group_size], q[:, 1::group_size] = 0, 2**bits - 1
    # The end farther from zero is exact, and zero itself is on the grid: keep it there.
    w = ((q - zero % 2**bits) * step).astype(np.float32)
    stored = quantize(w, Quantization(group_size, bits))
    back = dequantize(*stored, Quantization(group_size, bits))
    np.testing.assert_allclose(back, w, atol=1e-4 * np.abs(w).max())


def test_view() -> None:
    q = Quantization(32, 8)
    w = np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32)
    packed, scales, biases = quantize(w, q)
    stored = {"a.weight": packed, "a.scales": scales, "a.biases": biases, "b.weight": w, "c.biases": w}
    view = dequantized(stored, q)
    assert sorted(view) == ["a.weight", "b.weight", "c.biases"]
    assert len(view) == 3
    assert view["b.weight"] is w
    np.testing.assert_allclose(view["a.weight"], w, atol=0.05)
    assert "a.scales" not in view
    assert dequantized(stored, None) is stored
