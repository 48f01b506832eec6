"""Five small kernels, each as cases with a float64 reference. They are there to test the harness, not to be fast."""

from pathlib import Path

import ml_dtypes
import numpy as np

from metal_kernels.host.case import Case
from metal_kernels.host.kernel import metal_kernel

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
TOLERANCES = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}

SOFTPLUS = """inline float softplus(float x) {
    return x > 20.0f ? x : metal::log(1.0f + metal::exp(x));
}
"""


def body(name: str) -> str:
    return (Path(__file__).parent / "kernels" / f"{name}.metal").read_text()


def scan(dtype: str = "float32", batch: int = 2, steps: int = 13, channels: int = 5, groups: int = 4) -> Case:
    random = np.random.default_rng(steps)
    x, dt = (random.standard_normal((batch, steps, channels)).astype(FLOATS[dtype]) for _ in range(2))
    b, c = (random.standard_normal((batch, steps, 32)).astype(FLOATS[dtype]) for _ in range(2))
    a = -np.exp(random.standard_normal((channels, 32))).astype(np.float32)
    d = random.standard_normal(channels).astype(np.float32)
    h0 = random.standard_normal((batch, channels, 32)).astype(np.float32)
    kernel = metal_kernel("scan", ["x", "dt", "A", "B", "C", "D", "h0"], ["y", "h_last"], body("scan"), SOFTPLUS)
    call = {
        "inputs": [x, dt, a, b, c, d, h0],
        "template": [("T", FLOATS[dtype])],
        "grid": (-(-channels // groups) * groups * 32, batch, 1),
        "threadgroup": (groups * 32, 1, 1),
        "output_shapes": [x.shape, h0.shape],
        "output_dtypes": [FLOATS[dtype], np.float32],
    }
    y, h = _scan_reference(x, np.log1p(np.exp(dt.astype(np.float64))), a, b, c, h0)
    name = f"scan {dtype} batch {batch}, {steps} steps, {channels} channels"
    return Case(name, kernel, call, [y + d * x.astype(np.float64), h], TOLERANCES[dtype])


def scan_registers(dtype: str = "float32", batch: int = 2, steps: int = 9, channels: int = 40) -> Case:
    random = np.random.default_rng(steps)
    x = random.standard_normal((batch, steps, channels)).astype(FLOATS[dtype])
    dt = random.uniform(0.01, 1.0, x.shape).astype(FLOATS[dtype])
    b, c = (random.standard_normal((batch, steps, 16)).astype(FLOATS[dtype]) for _ in range(2))
    a = -np.exp(random.standard_normal((channels, 16))).astype(np.float32)
    kernel = metal_kernel("scan_registers", ["x", "dt", "A", "B", "C"], ["y"], body("scan_registers"))
    call = {
        "inputs": [x, dt, a, b, c],
        "template": [("T", FLOATS[dtype])],
        "grid": (channels, batch, 1),
        "threadgroup": (min(channels, 256), 1, 1),
        "output_shapes": [x.shape],
        "output_dtypes": [FLOATS[dtype]],
    }
    y, _ = _scan_reference(x, dt.astype(np.float64), a, b, c, np.zeros((batch, channels, 16)))
    name = f"scan_registers {dtype} batch {batch}, {steps} steps, {channels} channels"
    return Case(name, kernel, call, [y], TOLERANCES[dtype])


def _scan_reference(
    x: np.ndarray, dt: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray, h0: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """h = exp(dt A) h + dt x B, y = h C; x, dt (b, t, c), A (c, n), B, C (b, t, n), h (b, c, n)."""
    x, b, c, h = (array.astype(np.float64) for array in (x, b, c, h0))
    y = np.zeros(x.shape)
    for t in range(x.shape[1]):
        h = np.exp(dt[:, t, :, None] * a) * h + (dt[:, t] * x[:, t])[:, :, None] * b[:, t, None, :]
        y[:, t] = (h * c[:, t, None, :]).sum(-1)
    return y, h


def window_attention(heads: int = 2, length: int = 64, head_dim: int = 64, window: int = 40) -> Case:
    random = np.random.default_rng(length)
    q, k, v = (random.standard_normal((heads, length, head_dim)).astype(np.float32) for _ in range(3))
    scale = np.float32(head_dim**-0.5)
    kernel = metal_kernel("window_attention", ["q", "k", "v", "scale", "limits"], ["out"], body("window_attention"))
    call = {
        "inputs": [q, k, v, scale, np.array([window], np.int32)],
        "template": [("HEAD_DIM", head_dim)],
        "grid": (length // 32 * 128, heads, 1),
        "threadgroup": (128, 1, 1),
        "output_shapes": [q.shape],
        "output_dtypes": [np.float32],
    }
    name = f"window_attention {heads} heads, {length} x {head_dim}, window {window}"
    return Case(name, kernel, call, [attention_reference(q, k, v, window)], TOLERANCES["float32"])


def attention_reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None = None) -> np.ndarray:
    """softmax(q k^T / sqrt(p)) v in float64, causal within `window` if there is one; shapes (h, t, p)."""
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    scores = np.einsum("hqp,hkp->hqk", q, k) / np.sqrt(q.shape[-1])
    if window is not None:
        distance = np.arange(q.shape[1])[:, None] - np.arange(k.shape[1])
        scores[:, (distance < 0) | (distance >= window)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,hkp->hqp", weights / weights.sum(-1, keepdims=True), v)


def top_k(rows: int = 3, columns: int = 300, k: int = 4) -> Case:
    x = np.random.default_rng(columns).standard_normal((rows, columns)).astype(np.float32)
    x[:, 5::7] = x[:, 5:6]  # ties
    kernel = metal_kernel("top_k", ["x"], ["values", "indices"], body("top_k"))
    call = {
        "inputs": [x],
        "template": [("N", columns), ("K", k)],
        "grid": (rows * 128, 1, 1),
        "threadgroup": (128, 1, 1),
        "output_shapes": [(rows, k), (rows, k)],
        "output_dtypes": [np.float32, np.uint32],
    }
    indices = np.argsort(-x, axis=1, kind="stable")[:, :k].astype(np.uint32)
    values = np.take_along_axis(x, indices.astype(np.int64), 1).astype(np.float64)
    return Case(f"top_k {k} of {rows} x {columns}", kernel, call, [values, indices], 0.0)


def neighbours(threadgroups: int = 2, steps: int = 5) -> Case:
    x = np.random.default_rng(steps).standard_normal((threadgroups, 256)).astype(np.float32)
    kernel = metal_kernel("neighbours", ["x"], ["out"], body("neighbours"))
    call = {
        "inputs": [x],
        "template": [("STEPS", steps)],
        "grid": (x.size, 1, 1),
        "threadgroup": (256, 1, 1),
        "output_shapes": [x.shape],
        "output_dtypes": [np.float32],
    }
    value = x.astype(np.float64)
    for _ in range(steps):
        value = 0.5 * value + 0.25 * np.roll(value, -1, 1) + 0.25 * np.roll(value, 1, 1)
    return Case(f"neighbours {threadgroups} x 256, {steps} steps", kernel, call, [value], TOLERANCES["float32"])


def cases() -> list[Case]:
    """Every kernel, every dtype it takes, sizes that do not divide, and inputs of fewer than eight elements."""
    return [
        *(scan(dtype) for dtype in FLOATS),
        scan(steps=1, channels=1, batch=1, groups=1),  # small inputs come in the constant address space
        scan(steps=7, channels=9, batch=3, groups=2),
        *(scan_registers(dtype) for dtype in FLOATS),
        scan_registers(batch=1, steps=1, channels=1),
        window_attention(),
        window_attention(heads=1, length=96, window=1),
        window_attention(heads=1, length=32, head_dim=32, window=100),
        top_k(),
        top_k(rows=2, columns=6, k=6),
        top_k(rows=1, columns=129, k=3),
        neighbours(),
    ]
