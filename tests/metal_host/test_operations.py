"""The Metal standard library as the harness has it: values of functions, vectors, matrices, atomics and positions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from metal_kernels.host import CheckError, metal_kernel

from .samples import BFLOAT16, FLOATS

pytestmark = pytest.mark.usefixtures("harness")

X = np.random.default_rng(0).standard_normal(32).astype(np.float32)
U = np.arange(32, dtype=np.uint32) * 2654435761
LANES = np.arange(32)


PROLOGUE = "const uint i = thread_position_in_grid.x, lane = i % 32; const auto v = x[i]; (void)lane; (void)v;\n"


def elementwise(source: str, x: np.ndarray, output_dtype: Any = np.float32, rows: int = 1) -> np.ndarray:
    """Runs `source` in one SIMD-group, with `i`, `lane` and `v` (an element of x) declared; o is (rows, 32)."""
    kernel = metal_kernel("operation", ["x"], ["o"], PROLOGUE + source)
    (out,) = kernel(
        inputs=[x],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(rows, 32)],
        output_dtypes=[output_dtype],
    )
    return out if rows > 1 else out[0]


def evaluate(expressions: Sequence[str], x: np.ndarray, output_dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The value of every expression in every lane, by one kernel."""
    lines = [f"o[{row * 32} + i] = {expression};" for row, expression in enumerate(expressions)]
    return dict(zip(expressions, elementwise("\n".join(lines), x, output_dtype, len(lines)), strict=True))


def shifted(x: np.ndarray, by: int, fill: np.ndarray) -> np.ndarray:
    source = LANES + by
    inside = (source >= 0) & (source < 32)
    return np.where(inside, x[source % 32], fill)


SIMD = {
    "simd_sum(v)": np.full(32, X.sum()),
    "simd_product(v)": np.full(32, X.prod()),
    "simd_max(v)": np.full(32, X.max()),
    "simd_min(v)": np.full(32, X.min()),
    "simd_sum(float2(v, 1.0f)).y": np.full(32, 32.0),
    "simd_prefix_inclusive_sum(v)": np.cumsum(X),
    "simd_prefix_exclusive_sum(v)": np.cumsum(X) - X,
    "simd_prefix_inclusive_product(v)": np.cumprod(X),
    "simd_prefix_exclusive_product(v)": np.append(1, np.cumprod(X)[:-1]),
    "simd_shuffle(v, ushort(31 - lane))": X[::-1],
    "simd_broadcast(v, 5)": np.full(32, X[5]),
    "simd_broadcast_first(v)": np.full(32, X[0]),
    "simd_shuffle_xor(v, 8)": X[LANES ^ 8],
    "simd_shuffle_down(v, 4)": shifted(X, 4, X),
    "simd_shuffle_up(v, 4)": shifted(X, -4, X),
    "simd_shuffle_rotate_down(v, 3)": X[(LANES + 3) % 32],
    "simd_shuffle_rotate_up(v, 3)": X[(LANES - 3) % 32],
    "simd_shuffle_and_fill_down(v, float(lane), 4)": shifted(X, 4, (LANES + 4) % 32),
    "simd_shuffle_and_fill_up(v, float(lane), 4)": shifted(X, -4, (LANES - 4) % 32),
    "float(popcount(uint(uint64_t(simd_ballot(v > 0.0f)))))": np.full(32, (X > 0).sum()),
    "float(uint64_t(simd_active_threads_mask()) == 0xffffffffu)": np.ones(32),
    "simd_any(v > 3.0f) ? 1.0f : 0.0f": np.zeros(32),
    "simd_all(v < 9.0f) ? 1.0f : 0.0f": np.ones(32),
    "simd_is_first() ? 1.0f : 0.0f": np.eye(32)[0],
}


@pytest.fixture(scope="module")
def simd(harness: None) -> dict[str, np.ndarray]:
    return evaluate(list(SIMD), X)


@pytest.mark.parametrize("expression", SIMD)
def test_simd_functions(expression: str, simd: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(simd[expression], SIMD[expression], rtol=2e-5, atol=1e-5)


INTEGERS: dict[str, Any] = {
    "simd_and(v | 1u)": np.bitwise_and.reduce(U | 1),
    "simd_or(v)": np.bitwise_or.reduce(U),
    "simd_xor(v)": np.bitwise_xor.reduce(U),
    "popcount(v)": [bin(u).count("1") for u in U],
    "clz(v)": [32 - int(u).bit_length() for u in U],
    "ctz(v)": [(int(u) & -int(u)).bit_length() - 1 if u else 32 for u in U],
    "metal::max(v, 7u) - metal::min(v, 7u)": np.maximum(U, 7) - np.minimum(U, 7),
    "(uint4(v) >> uint4(1u, 2u, 3u, 4u)).z": U >> 3,
}


@pytest.fixture(scope="module")
def integers(harness: None) -> dict[str, np.ndarray]:
    return evaluate(list(INTEGERS), U, np.uint32)


@pytest.mark.parametrize("expression", INTEGERS)
def test_integers(expression: str, integers: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(integers[expression], np.broadcast_to(INTEGERS[expression], 32))


FLOATING = {
    "dot(float4(v, 1.0f, 2.0f, v).xw, float2(2.0f, 3.0f))": 5 * X,
    "float4(half4(float4(v))).y": X.astype(np.float16),
    "as_type<float>(as_type<uint>(v) ^ 0x80000000u)": -X,
    "clamp(v, -0.5f, 0.5f)": X.clip(-0.5, 0.5),
    "select(1.0f, 2.0f, v > 0.0f)": np.where(X > 0, 2, 1),
    "select(float2(1.0f), float2(v), float2(v) > 0.0f).y": np.where(X > 0, X, 1),
    "mix(1.0f, 3.0f, v)": 1 + 2 * X,
    "any(float3(v, 1.0f, -1.0f) > 2.0f) ? 1.0f : 0.0f": X > 2,
    "float3(float3(v, 2.0f, 3.0f).zyx).y + vec<float, 2>(v, 1.0f).y": np.full(32, 3),
    "metal::exp(float2(v, 0.0f)).x": np.exp(X),
    "metal::precise::exp(v) - metal::fast::exp(v)": np.zeros(32),
    "metal::fma(v, v, 1.0f)": X * X + 1,
    "metal::max(v, NAN) + metal::min(NAN, v)": 2 * X,
    "metal::exp(-INFINITY) + 1.0h + 0.5bf * 2.0": np.full(32, 2.0),
    "metal::rsqrt(metal::abs(v)) * metal::sqrt(metal::abs(v))": np.ones(32),
    "metal::sign(v) + metal::fract(2.75f) + metal::saturate(7.0f)": np.sign(X) + 1.75,
    "metal::isnan(v / 0.0f - v / 0.0f) && metal::isinf(1.0f / 0.0f) ? 1.0f : 0.0f": np.ones(32),
    "float(numeric_limits<half>::max()) + float(Limits<bfloat16_t>::min < bfloat16_t(0))": np.full(32, 65505.0),
}


@pytest.fixture(scope="module")
def floating(harness: None) -> dict[str, np.ndarray]:
    return evaluate(list(FLOATING), X)


@pytest.mark.parametrize("expression", FLOATING)
def test_maths_and_vectors(expression: str, floating: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(floating[expression], FLOATING[expression], rtol=1e-6, atol=1e-6)


def test_swizzles_can_be_written() -> None:
    got = elementwise("float4 q = float4(v, 1.0f, 2.0f, 3.0f); q.wz = q.xy; q.xy *= 2.0f; o[i] = q.w + q.z + q.x;", X)
    np.testing.assert_allclose(got, 3 * X + 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_floats_round_after_every_operation(dtype: str) -> None:
    x = (X + 2.5).astype(FLOATS[dtype])
    metal = {"float16": "half", "bfloat16": "bfloat"}[dtype]
    got = elementwise(f"{metal} s = v; for (int k = 0; k < 5; ++k) s = s * v + s - v / s; o[i] = s;", x, FLOATS[dtype])
    expected = x.copy()
    for _ in range(5):
        expected = expected * x + expected - x / expected
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_integer_dtypes(dtype: Any) -> None:
    x = np.arange(32).astype(dtype)
    np.testing.assert_array_equal(elementwise("o[i] = v;", x, dtype), x)


@pytest.mark.parametrize(
    ("grid", "threadgroup"),
    [
        ((5, 3, 2), (4, 2, 1)),
        ((70, 1, 1), (64, 1, 1)),
        ((33, 5, 1), (8, 8, 1)),
        ((4, 4, 4), (4, 4, 4)),
        ((3, 1, 1), (256, 1, 1)),  # MLX makes the threadgroup no larger than the grid
        ((1, 1, 1), (1, 1, 1)),
    ],
)
def test_positions(grid: tuple[int, int, int], threadgroup: tuple[int, int, int]) -> None:
    """What a thread is told of itself, with smaller threadgroups at the grid's edge."""
    source = """
    uint3 p = thread_position_in_grid, q = thread_position_in_threadgroup, g = threadgroup_position_in_grid;
    uint3 n = threads_per_threadgroup, d = dispatch_threads_per_threadgroup, all = threads_per_grid;
    uint count = n.x * n.y * n.z, full = d.x * d.y * d.z;
    bool ok = thread_index_in_threadgroup == q.x + n.x * (q.y + n.y * q.z) && all.x == grid_size.x
      && thread_index_in_simdgroup == thread_index_in_threadgroup % 32 && grid_origin.y == 0
      && simdgroup_index_in_threadgroup == thread_index_in_threadgroup / 32
      && simdgroups_per_threadgroup == (count + 31) / 32 && dispatch_simdgroups_per_threadgroup == (full + 31) / 32
      && quadgroups_per_threadgroup == (count + 3) / 4 && dispatch_quadgroups_per_threadgroup == (full + 3) / 4
      && quadgroup_index_in_threadgroup == thread_index_in_threadgroup / 4
      && thread_index_in_quadgroup == thread_index_in_simdgroup % 4
      && thread_execution_width == 32 && threads_per_simdgroup == 32;
    for (int k = 0; k < 3; ++k)
      ok = ok && p[k] == g[k] * d[k] + q[k] && threadgroups_per_grid[k] == (all[k] + d[k] - 1) / d[k]
        && n[k] == metal::min(d[k], all[k] - g[k] * d[k]);
    o[p.x + all.x * (p.y + all.y * p.z)] = ok ? int(x[0]) : 0;"""
    (out,) = metal_kernel("positions", ["x"], ["o"], source)(
        inputs=[np.full(1, 7.0, np.float32)],
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[grid[::-1]],
        output_dtypes=[np.int32],
    )
    np.testing.assert_array_equal(out, 7)


@pytest.mark.parametrize(
    ("operation", "dtype", "expected"),
    [
        ("add", np.uint32, lambda x: x.sum()),
        ("sub", np.int32, lambda x: -x.sum()),
        ("min", np.int32, lambda x: min(0, x.min())),
        ("max", np.int32, lambda x: max(0, x.max())),
        ("or", np.uint32, np.bitwise_or.reduce),
        ("xor", np.uint32, np.bitwise_xor.reduce),
        ("add", np.float32, lambda x: x.sum()),
    ],
)
def test_atomics(operation: str, dtype: Any, expected: Any) -> None:
    source = f"""
    const uint i = thread_position_in_grid.x;
    atomic_fetch_{operation}_explicit(&o[0], x[i], memory_order_relaxed);"""
    x = (np.arange(100) * 7 % 32).astype(dtype)
    (out,) = metal_kernel("atomics", ["x"], ["o"], source, atomic_outputs=True)(
        inputs=[x],
        grid=(100, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[dtype],
        init_value=0,
    )
    assert out[0] == expected(x)


@pytest.mark.parametrize("dtype", FLOATS)
def test_matrices(dtype: str) -> None:
    metal = {"float32": "float", "float16": "half", "bfloat16": "bfloat"}[dtype]
    source = f"""
    simdgroup_matrix<{metal}, 8, 8> a, b;
    simdgroup_matrix<float, 8, 8> c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f), two(2.0f);
    simdgroup_load(a, A, 16, ulong2(8, 0));
    simdgroup_load(b, B, 8, ulong2(0, 0), true);
    simdgroup_multiply_accumulate(c, a, b, c);
    simdgroup_store(c, product, 8);
    simdgroup_multiply(c, c, two);
    simdgroup_store(c, doubled, 8, ulong2(0, 0), true);
    first[thread_index_in_simdgroup] = c.thread_elements()[0];"""
    random = np.random.default_rng(0)
    a, b = random.standard_normal((8, 16)).astype(FLOATS[dtype]), random.standard_normal((8, 8)).astype(FLOATS[dtype])
    product, doubled, first = metal_kernel("matrices", ["A", "B"], ["product", "doubled", "first"], source)(
        inputs=[a, b],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(8, 8), (8, 8), (32,)],
        output_dtypes=[np.float32] * 3,
    )
    expected = a[:, 8:].astype(np.float32) @ b.T.astype(np.float32)
    np.testing.assert_allclose(product, expected, atol=1e-5)
    np.testing.assert_allclose(doubled, 2 * expected.T, atol=1e-5)
    np.testing.assert_allclose(np.sort(first), np.sort(2 * expected[:, ::2].ravel()), atol=1e-5)


@pytest.mark.parametrize("scalar", ["bool", "char", "ushort", "int", "long", "half", "bfloat", "float"])
def test_every_load_and_store_is_checked(scalar: str) -> None:
    """A type whose accesses the compiler left without instrumentation would let faults pass."""
    dtype = np.dtype(
        {
            "bool": np.bool_,
            "char": np.int8,
            "ushort": np.uint16,
            "int": np.int32,
            "long": np.int64,
            "half": np.float16,
            "bfloat": BFLOAT16,
            "float": np.float32,
        }[scalar]
    )
    copies = [
        f"if (which[0] == {width}) ((device {vector}*)o)[to] = ((const device {vector}*)x)[from];"
        for width, vector in enumerate([scalar, f"{scalar}2", f"{scalar}3", f"{scalar}4"], 1)
    ]
    source = "const int from = which[1], to = which[2];\n" + "\n".join(copies)
    kernel = metal_kernel("copies", ["x", "which"], ["o"], source)
    for width, elements in ((1, 1), (2, 2), (3, 4), (4, 4)):  # a vector of 3 takes the room of 4
        for kind, places in (("reads", (16, 0)), ("writes", (0, 16))):
            with pytest.raises(CheckError) as caught:
                kernel(
                    inputs=[np.zeros(16 * elements, dtype), np.array([width, *places], np.int32)],
                    grid=(1, 1, 1),
                    threadgroup=(1, 1, 1),
                    output_shapes=[(16 * elements,)],
                    output_dtypes=[dtype],
                )
            findings = caught.value.findings
            assert {finding.kind for finding in findings} == {"out-of-bounds"}
            assert all(kind in finding.message for finding in findings)


def test_components_of_wide_bfloat_vectors() -> None:
    got = elementwise("vec<bfloat, 4> b(v); o[i] = (b + b.yxwz).z;", X.astype(BFLOAT16), BFLOAT16)
    np.testing.assert_array_equal(got, (2 * X.astype(BFLOAT16).astype(np.float32)).astype(BFLOAT16))
