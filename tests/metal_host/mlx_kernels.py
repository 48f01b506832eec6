"""MLX's own kernels as cases: their text is read from the installed wheel, known to be right on Apple's GPUs.

Not one line of it is stored here. What plain text substitution must change: includes are pasted in, function
constants (which MLX sets when it builds a pipeline) get their values, and the kernels are called from a body of ours.
"""

import re
from pathlib import Path

import numpy as np

from metal_kernels.host.case import Case
from metal_kernels.host.kernel import metal_kernel
from metal_kernels.host.toolchain import INCLUDE, mlx_headers

from .samples import FLOATS, TOLERANCES, attention_reference

KERNELS = "mlx/backend/metal/kernels"
# In front of every kernel already, through utils.h.
PRESENT = {f"{KERNELS}/{name}.h" for name in ("bf16", "bf16_math", "complex", "defines", "logging", "utils")}


def mlx_text(name: str, constants: dict[str, str]) -> str:
    """A header of MLX's kernels with everything it includes, and with these function constants."""
    headers = mlx_headers()
    assert headers is not None
    text = _with_includes(f"{KERNELS}/{name}", headers, set(PRESENT))
    text = re.sub(
        r"constant (\w+) (\w+) \[\[function_constant\(\d+\)\]\];",
        lambda found: f"constant {found[1]} {found[2]} = {constants.get(found[2], '0')};",
        text,
    )
    return re.sub(r"\[\[[^\]]*\]\]", "", text)


def _with_includes(path: str, headers: Path, seen: set[str]) -> str:
    if path in seen:
        return ""
    seen.add(path)
    ours = INCLUDE / "mlx_override" / path
    lines = []
    for line in (ours if ours.exists() else headers / path).read_text().splitlines():
        if include := re.match(r'\s*#include "(mlx/.*)"', line):
            lines.append(_with_includes(include[1], headers, seen))
        elif not re.match(r"\s*#(include|pragma)", line):
            lines.append(line)
    return "\n".join(lines)


def softmax(dtype: str, columns: int, threads: int, looped: bool) -> Case:
    x = (np.random.default_rng(columns).standard_normal((3, columns)) * 4).astype(FLOATS[dtype])
    positions = "threadgroup_position_in_grid.x, thread_position_in_threadgroup.x"
    size = "threads_per_threadgroup.x, " if looped else ""
    source = f"""softmax_{"looped" if looped else "single_row"}<T, float>(
        x, out, n, {positions}, {size}thread_index_in_simdgroup, simdgroup_index_in_threadgroup);"""
    kernel = metal_kernel("softmax", ["x", "n"], ["out"], source, mlx_text("softmax.h", {}))
    call = {
        "inputs": [x, np.int32(columns)],
        "template": [("T", FLOATS[dtype])],
        "grid": (3 * threads, 1, 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": [x.shape],
        "output_dtypes": [FLOATS[dtype]],
    }
    weights = np.exp(x.astype(np.float64) - x.astype(np.float64).max(1, keepdims=True))
    name = f"softmax {'looped' if looped else 'single row'} {dtype} 3 x {columns}"
    return Case(name, kernel, call, [weights / weights.sum(1, keepdims=True)], TOLERANCES[dtype])


def sdpa_vector(dtype: str, queries: int = 1, keys: int = 77, heads: int = 4, kv_heads: int = 2) -> Case:
    """Few queries against all keys, causal: how MLX decodes."""
    random = np.random.default_rng(keys)
    q = random.standard_normal((heads, queries, 64)).astype(FLOATS[dtype])
    k, v = (random.standard_normal((kv_heads, keys, 64)).astype(FLOATS[dtype]) for _ in range(2))
    source = """sdpa_vector<T, 64>(q, k, v, out, sizes[0], sizes[1], strides[0], strides[1], strides[0], strides[1],
        scale, nullptr, nullptr, sizes[0], sizes[0], sizes[0], nullptr, sizes[0], threadgroup_position_in_grid,
        threadgroups_per_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);"""
    names = ["q", "k", "v", "sizes", "strides", "scale"]
    kernel = metal_kernel("sdpa", names, ["out"], source, mlx_text("sdpa_vector.h", {"do_causal": "true"}))
    sizes, strides = np.array([heads // kv_heads, keys], np.int32), np.array([keys * 64, 64], np.uint64)
    call = {
        "inputs": [q, k, v, sizes, strides, np.float32(64**-0.5)],
        "template": [("T", FLOATS[dtype])],
        "grid": (heads * 1024, queries, 1),
        "threadgroup": (1024, 1, 1),
        "output_shapes": [q.shape],
        "output_dtypes": [FLOATS[dtype]],
    }
    repeated = [np.repeat(x, heads // kv_heads, 0) for x in (k, v)]
    name = f"sdpa_vector {dtype} {queries} x {keys}"
    return Case(name, kernel, call, [_causal_at_the_end(q, *repeated)], TOLERANCES[dtype])


def steel_attention(dtype: str, queries: int, keys: int, head_dim: int = 64) -> Case:
    """Tiled attention with SIMD-group matrices, causal: how MLX prefills."""
    random = np.random.default_rng(queries)
    heads, kv_heads = 4, 2
    q = random.standard_normal((heads, queries, head_dim)).astype(FLOATS[dtype])
    k, v = (random.standard_normal((kv_heads, keys, head_dim)).astype(FLOATS[dtype]) for _ in range(2))
    rows = 32
    columns = 16 if head_dim == 128 else 32
    constants = {
        "align_Q": str(queries % rows == 0).lower(),
        "align_K": str(keys % columns == 0).lower(),
        "do_causal": "true",
    }
    source = f"""AttnParams p;
    p.B = 1, p.H = {heads}, p.D = {head_dim}, p.qL = {queries}, p.kL = {keys}, p.gqa_factor = {heads // kv_heads};
    p.scale = scale, p.NQ = {-(-queries // rows)}, p.NK = {-(-keys // columns)}, p.NQ_aligned = {queries // rows};
    p.NK_aligned = {keys // columns}, p.qL_rem = {queries % rows}, p.kL_rem = {keys % columns};
    p.qL_off = {keys - queries};
    p.Q_strides[0] = p.O_strides[0] = p.K_strides[0] = p.V_strides[0] = 0;
    p.Q_strides[1] = p.O_strides[1] = {queries * head_dim}, p.K_strides[1] = p.V_strides[1] = {keys * head_dim};
    p.Q_strides[2] = p.O_strides[2] = p.K_strides[2] = p.V_strides[2] = {head_dim};
    attention<T, {rows}, {columns}, {head_dim}, {head_dim}, 4, 1>(q, k, v, out, &p, nullptr,
        (const device float*)nullptr, nullptr, nullptr, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
        threadgroup_position_in_grid, thread_position_in_threadgroup);"""
    header = mlx_text("steel/attn/kernels/steel_attention.h", constants)
    kernel = metal_kernel("steel_attention", ["q", "k", "v", "scale"], ["out"], source, header)
    call = {
        "inputs": [q, k, v, np.float32(head_dim**-0.5)],
        "template": [("T", FLOATS[dtype])],
        "grid": (-(-queries // rows) * 128, heads, 1),
        "threadgroup": (128, 1, 1),
        "output_shapes": [q.shape],
        "output_dtypes": [FLOATS[dtype]],
    }
    repeated = [np.repeat(x, heads // kv_heads, 0) for x in (k, v)]
    name = f"steel_attention {dtype} {queries} x {keys}, head {head_dim}"
    return Case(name, kernel, call, [_causal_at_the_end(q, *repeated)], TOLERANCES[dtype])


def _causal_at_the_end(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention of the last q.shape[1] positions to all before them."""
    padded = np.concatenate([np.zeros((q.shape[0], k.shape[1] - q.shape[1], q.shape[2]), q.dtype), q], 1)
    return attention_reference(padded, k, v, window=k.shape[1])[:, -q.shape[1] :]


def cases() -> list[Case]:
    return [
        *(softmax(dtype, 1000, threads=256, looped=False) for dtype in FLOATS),
        softmax("float32", 37, threads=32, looped=False),
        softmax("float32", 4099, threads=1024, looped=True),
        *(sdpa_vector(dtype) for dtype in FLOATS),
        sdpa_vector("float32", queries=5, keys=33),
        *(steel_attention(dtype, 64, 64) for dtype in FLOATS),
        steel_attention("float32", 45, 77),
        steel_attention("float16", 33, 50, head_dim=128),
    ]
