"""A fault planted in a sound kernel is reported, with its kind and its line; subtle kernels that are sound are not."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from metal_kernels.host import CheckError, CompileError, KernelError, LintError, Run, TypeCheckError, metal_kernel

from . import samples
from .samples import BFLOAT16

pytestmark = pytest.mark.usefixtures("harness")

I = "const uint i = thread_position_in_grid.x; "
LANE = "const uint lane = thread_index_in_simdgroup; "
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup); "


def run(
    source: str,
    *,
    count: int = 40,
    threads: int = 40,
    threadgroup: int = 32,
    outputs: int | None = None,
    dtype: Any = np.float32,
    output_dtype: Any = None,
    header: str = "",
    atomic_outputs: bool = False,
    init_value: float | None = None,
    options: Run | None = None,
) -> np.ndarray:
    """A kernel from `a` (0, 1, 2, ...) to `o`."""
    kernel = metal_kernel("fault", ["a"], ["o"], source, header, atomic_outputs=atomic_outputs)
    (out,) = kernel(
        inputs=[np.arange(count).astype(dtype)],
        grid=(threads, 1, 1),
        threadgroup=(threadgroup, 1, 1),
        output_shapes=[(threads if outputs is None else outputs,)],
        output_dtypes=[output_dtype or dtype],
        init_value=init_value,
        run=options or Run(),
    )
    return out


def replaced(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


def attention(old: str, new: str) -> None:
    case = samples.window_attention(heads=1)
    case.with_source(replaced(case.kernel.source, old, new)).run(Run())


def scan(old: str, new: str) -> None:
    case = samples.scan()
    case.with_source(replaced(case.kernel.source, old, new)).run(Run())


def top_k(old: str, new: str) -> None:
    case = samples.top_k()
    case.with_source(replaced(case.kernel.source, old, new)).run(Run())


TILE_READY = "threadgroup_barrier(mem_flags::mem_threadgroup);  // this tile is there"
FIRST = "inline float first(const device float* p) { return p[0]; }\n"

# Reported by the checker when the kernel runs: what, kind, how.
RUNS_WRONG: list[tuple[str, str, Callable[[], Any]]] = [
    # races
    ("no barrier before a tile is read", "race|uninitialised", lambda: attention(TILE_READY, "")),
    (
        "no barrier before a tile is overwritten",
        "race",
        lambda: attention("threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile has been read", ""),
    ),
    ("barrier with mem_none", "race", lambda: attention(TILE_READY, "threadgroup_barrier(mem_flags::mem_none);")),
    ("barrier with mem_device", "race", lambda: attention(TILE_READY, "threadgroup_barrier(mem_flags::mem_device);")),
    (
        "simdgroup_barrier where threads of other SIMD-groups write",
        "race",
        lambda: attention(TILE_READY, "simdgroup_barrier(mem_flags::mem_threadgroup);"),
    ),
    (
        "no simdgroup_barrier",
        "race",
        lambda: attention(
            "simdgroup_barrier(mem_flags::mem_threadgroup);  // the probabilities and decays are there", ""
        ),
    ),
    (
        "no barrier before a winner is read",
        "race|uninitialised",
        lambda: top_k("threadgroup_barrier(mem_flags::mem_threadgroup);  // every SIMD-group's best is there", ""),
    ),
    ("threadgroups write one element", "race", lambda: run(I + "o[i / 64] = a[i];", count=128, threads=128, outputs=2)),
    (
        "threadgroup reads what another writes",
        "race|uninitialised",
        lambda: run(
            I + "o[i] = a[i]; threadgroup_barrier(mem_flags::mem_device); o[i] = o[(i + 32) % 64];", threads=64
        ),
    ),
    (
        "device memory handed over with mem_threadgroup",
        "race",
        lambda: run(
            I + "o[i] = a[i]; " + BARRIER + "float s = o[(i + 1) % 32]; threadgroup_barrier(mem_flags::mem_device); "
            "o[i] = s;",
            threads=32,
        ),
    ),
    (
        "a lane's value read without a barrier, though SIMD-groups look lockstep",
        "race",
        lambda: run(
            "threadgroup float t[32]; " + I + "t[i] = a[i]; float s = simd_sum(1.0f); o[i] = t[31 - i] + s;", threads=32
        ),
    ),
    (
        "one lane still reads what another writes",
        "race",
        lambda: run(
            "threadgroup float t[1]; " + I + "if (i == 0) t[0] = 1; simdgroup_barrier(mem_flags::mem_threadgroup); "
            "float s = t[0]; if (i == 5) t[0] = 2; o[i] = s + a[i];",
            threads=32,
        ),
    ),
    (
        "a plain write between atomics",
        "race",
        lambda: run(
            "threadgroup atomic_uint n; "
            + I
            + "if (i == 0) atomic_store_explicit(&n, 0u, memory_order_relaxed); "
            + BARRIER
            + "atomic_fetch_add_explicit(&n, 1u, memory_order_relaxed); "
            "if (i == 9) *(threadgroup uint*)&n = 0; o[i] = a[i];",
            threads=32,
        ),
    ),
    (
        "an element that two threadgroups have read, written by one of them",
        "race",
        lambda: run(
            I + "o[0] = o[0] + (threadgroup_position_in_grid.x == 1 ? 1.0f : 0.0f); o[i] = a[i];",
            threads=64,
            threadgroup=1,
            init_value=0.0,
        ),
    ),
    # memory nobody has written
    ("threadgroup memory not all set", "uninitialised", lambda: top_k("taken[i] = 0;", "if (i > 0) taken[i] = 0;")),
    ("an output read before it is written", "uninitialised", lambda: run(I + "o[i] = o[i] + a[i];")),
    ("an output element never written", "unwritten-output", lambda: run(I + "if (i != 7) o[i] = a[i];")),
    ("an output shorter than it should be", "unwritten-output", lambda: run(I + "o[i] = a[i];", outputs=41)),
    # bounds
    ("read one past the end", "out-of-bounds", lambda: scan("x[row * channels", "x[1 + row * channels")),
    ("no guard for the tail", "out-of-bounds", lambda: run(I + "o[i] = a[i];", count=40, threads=64)),
    ("write one past the end", "out-of-bounds", lambda: run(I + "o[i + 1] = a[i];")),
    ("read before the buffer", "out-of-bounds", lambda: run(I + "o[i] = a[int(i) - 1];")),
    ("read far beyond the buffer", "out-of-bounds", lambda: run(I + "o[i] = a[i + 100000000u];")),
    (
        "read through a null pointer",
        "out-of-bounds",
        lambda: run(I + "device const float* p = nullptr; o[i] = p[i];"),
    ),
    ("read through a wild pointer", "out-of-bounds", lambda: run(I + "o[i] = a[i + 0x100000000000ul];")),
    ("a constant input read past its end", "out-of-bounds", lambda: run(I + "o[i] = a[i];", count=7, threads=8)),
    ("bfloat read past the end", "out-of-bounds", lambda: run(I + "o[i] = a[i + 1];", dtype=BFLOAT16)),
    (
        "threadgroup array overrun through a pointer",
        "out-of-bounds",
        lambda: run(
            "threadgroup float t[32]; " + I + LANE + "threadgroup float* p = t; p[lane + 1] = a[i]; o[i] = a[i];",
            threads=32,
        ),
    ),
    ("a vector's component out of range", "undefined", lambda: run(I + "float4 v(a[i]); o[i] = v[i % 5];")),
    # undefined arithmetic and indexing
    (
        "a row of a 2-D tile overrun",
        "undefined",
        lambda: run("threadgroup float t[4][8]; " + I + LANE + "t[lane / 9][lane % 9] = a[i]; o[i] = 0;", threads=32),
    ),
    (
        "a private array overrun",
        "undefined",
        lambda: run(I + "float p[4]; for (int k = 0; k <= 4; ++k) p[k] = a[i]; o[i] = p[i & 3];"),
    ),
    (
        "an array at the end of a struct overrun through a reference",
        "undefined",
        lambda: run(
            I + "sums s; clear(s); o[i] = a[i] + s.of[i & 3];",
            header="struct sums { float of[4]; };\n"
            "inline void clear(thread sums& s) { for (int k = 0; k <= 4; ++k) s.of[k] = 0; }",
        ),
    ),
    (
        "integer overflow in an index",
        "undefined",
        lambda: run(I + "int big = int(i) + 2147483640; o[i] = a[i] + float(big > 0);"),
    ),
    ("a shift by 32", "undefined", lambda: run(I + "o[i] = a[i] + float(1u << i);")),
    ("an integer division by zero", "undefined", lambda: run(I + "o[i] = a[i] + float(7 / int(i));")),
    ("NaN to an integer", "undefined", lambda: run(I + "o[i] = float(int(0.0f / a[i]));")),
    (
        "a misaligned float4",
        "undefined",
        lambda: run(I + "o[i] = (*(const device float4*)(a + 1 + 4 * (i & 1))).x;", threads=32),
    ),
    (
        "a float4 of an input that is a slice",
        "undefined",
        lambda: run(I + "o[i] = (*(const device float4*)(a + 4 * (i & 1))).x;", options=Run(input_offset=1)),
    ),
    # divergence
    (
        "a barrier that one SIMD-group skips",
        "divergence",
        lambda: attention(TILE_READY, "if (group != 1) threadgroup_barrier(mem_flags::mem_threadgroup);"),
    ),
    (
        "a return before a barrier",
        "barrier-divergence",
        lambda: run(
            "threadgroup float t[32]; " + I + "if (i > 20) return; t[i] = a[i]; " + BARRIER + "o[i] = t[0];", threads=32
        ),
    ),
    (
        "two barriers for one",
        "divergence",
        lambda: run(
            I + "if (i < 32) threadgroup_barrier(mem_flags::mem_none); "
            "else threadgroup_barrier(mem_flags::mem_none); o[i] = a[i];",
            count=64,
            threads=64,
            threadgroup=64,
        ),
    ),
    (
        "a SIMD-group function in divergent code",
        "simd-divergence",
        lambda: run(I + "float s = a[i]; if (i < 16) s = simd_sum(s); else s = simd_max(s); o[i] = s;", threads=32),
    ),
    (
        "a matrix in half a SIMD-group",
        "simd-divergence",
        lambda: run(
            "simdgroup_float8x8 m; simdgroup_load(m, a); simdgroup_store(m, o);", count=64, threads=16, outputs=64
        ),
    ),
    (
        "a shuffle from a lane that does not exist",
        "inactive-lane",
        lambda: run(I + "o[i] = simd_shuffle(a[i], ushort(i + 20));", threads=32),
    ),
    (
        "a shuffle from a lane that has returned",
        "inactive-lane",
        lambda: run(I + "o[i] = 0; if (i == 3) return; o[i] = simd_shuffle_xor(a[i], 1);", threads=32),
    ),
    # the rest
    (
        "threadgroup memory over 32 KiB",
        "threadgroup-size",
        lambda: run("threadgroup float t[9000]; " + I + "t[i] = a[i]; o[i] = t[i];"),
    ),
    (
        "threadgroup memory far over 32 KiB",
        "threadgroup-size",
        lambda: run("threadgroup float t[90000]; " + I + "t[i] = a[i]; o[i] = t[i];"),
    ),
    (
        "an endless loop",
        "timeout",
        lambda: run(
            I + "volatile float x = a[i]; while (x > -1.0f) { x = x + 0.0f; } o[i] = x;", options=Run(timeout_s=1)
        ),
    ),
    (
        "a write to an input",
        "write-to-input",
        lambda: run(I + "device float* p = const_cast<device float*>(a); p[i] = 1; o[i] = a[i];"),
    ),
]

# Refused before it runs.
REFUSED: list[tuple[str, type[KernelError], str, Callable[[], Any]]] = [
    (
        "a device pointer as a threadgroup pointer",
        TypeCheckError,
        "threadgroup|address_space|different address space|changes address space",
        lambda: run(I + "threadgroup const float* p = a; o[i] = p[i];"),
    ),
    (
        "a threadgroup array as a device argument",
        TypeCheckError,
        "first",
        lambda: run("threadgroup float t[32]; " + I + "t[i] = a[i]; " + BARRIER + "o[i] = first(t);", header=FIRST),
    ),
    (
        "an input of fewer than 8 elements as a device argument",
        TypeCheckError,
        "first",
        lambda: run(I + "o[i] = first(a);", count=4, header=FIRST),
    ),
    (
        "a variable-length array",
        TypeCheckError,
        "variable",
        lambda: run(I + "float p[int(a[0]) + 1]; p[0] = a[i]; o[i] = p[0];"),
    ),
    (
        "an atomic maximum of floats",
        TypeCheckError,
        "deleted",
        lambda: run("atomic_fetch_max_explicit(&o[0], a[0], memory_order_relaxed);", atomic_outputs=True, init_value=0),
    ),
    ("a SIMD-group sum of bools", TypeCheckError, "simd_sum", lambda: run(I + "o[i] = simd_sum(a[i] > 0.0f);")),
    (
        "a SIMD-group sum of 64-bit integers",
        TypeCheckError,
        "simd_sum",
        lambda: run(I + "o[i] = simd_sum(a[i]);", dtype=np.int64),
    ),
    ("if constexpr", TypeCheckError, "C\\+\\+17", lambda: run(I + "if constexpr (true) o[i] = a[i];")),
    ("a name of MLX's", TypeCheckError, "grid_size", lambda: run(I + "uint grid_size = 3; o[i] = a[i] + grid_size;")),
    ("float to bfloat", KernelError, "error:", lambda: run(I + "o[i] = float(a[i]) * 2.0f;", dtype=BFLOAT16)),
    ("an undeclared function", TypeCheckError, "cbrt", lambda: run(I + "o[i] = metal::cbrt(a[i]);")),
    (
        "too large a private array",
        CompileError,
        "frame",
        lambda: run(I + "float p[9000]; for (int k = 0; k < 9000; ++k) p[k] = a[(i + k) % 40]; o[i] = p[int(a[i])];"),
    ),
    (
        "a threadgroup variable with an initialiser",
        CompileError,
        "initialiser",
        lambda: run("threadgroup float t = 0; " + I + "o[i] = t;"),
    ),
    ("a pointer to no address space", LintError, "address space", lambda: run(I + "const float* p = a; o[i] = p[i];")),
    ("double", LintError, "double", lambda: run(I + "double x = a[i]; o[i] = x;")),
    ("a character that is not ASCII", LintError, "ASCII", lambda: run(I + "// \u2264 bound\n o[i] = a[i];")),
    (
        "a program-scope variable that is not constant",
        LintError,
        "constant address space",
        lambda: run(I + "o[i] = a[i] * scale;", header="constexpr float scale = 2.0f;\n"),
    ),
]

# Sound, and easy to report by mistake: what, and how; each must give 0, 1, 2, ... or what it says.
SOUND: list[tuple[str, Callable[[], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = [
    ("float literals without a suffix", lambda: run(I + "o[i] = a[i] * 0.1 + 1e-3;"), lambda a: a * 0.1 + 1e-3),
    (
        "all lanes read, a simdgroup_barrier, then one reads again and writes",
        lambda: run(
            "threadgroup float t[1]; " + I + "if (i == 0) t[0] = 3; simdgroup_barrier(mem_flags::mem_threadgroup); "
            "float s = t[0]; simdgroup_barrier(mem_flags::mem_threadgroup); if (i == 5) t[0] += s; o[i] = s;",
            threads=32,
        ),
        lambda a: np.full(32, 3.0),
    ),
    (
        "device memory handed over with mem_device",
        lambda: run(
            I + "o[i] = a[i]; threadgroup_barrier(mem_flags::mem_device); float s = o[31 - i]; "
            "threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup); o[i] = s;",
            threads=32,
        ),
        lambda a: a[:32][::-1],
    ),
    (
        "neighbouring halves by different threads",
        lambda: run("threadgroup half t[32]; " + I + "t[i] = a[31 - i]; o[i] = t[i];", threads=32, dtype=np.float16),
        lambda a: a[:32][::-1],
    ),
    (
        "components of one half4 by different threads",
        lambda: run(
            "threadgroup half4 t[8]; "
            + I
            + "t[i / 4][i % 4] = half(a[i]); simdgroup_barrier(mem_flags::mem_threadgroup); "
            "o[i] = t[i / 4][3 - i % 4];",
            threads=32,
        ),
        lambda a: a[:32].reshape(8, 4)[:, ::-1].ravel(),
    ),
    (
        "a threadgroup counter set and added to atomically",
        lambda: run(
            "threadgroup atomic_uint n; "
            + I
            + "if (i == 0) atomic_store_explicit(&n, 0u, memory_order_relaxed); "
            + BARRIER
            + "atomic_fetch_add_explicit(&n, i, memory_order_relaxed); "
            + BARRIER
            + "o[i] = float(atomic_load_explicit(&n, memory_order_relaxed));",
            threads=40,
            threadgroup=40,
        ),
        lambda a: np.full(40, 780.0),
    ),
    (
        "lanes that return before the others sum",
        lambda: run(I + "o[i] = 0; if (i == 31 || i == 7) return; o[i] = simd_sum(1.0f);", threads=32),
        lambda a: np.where((a[:32] == 31) | (a[:32] == 7), 0.0, 30.0),
    ),
    (
        "a sum over a SIMD-group of 8",
        lambda: run(I + "o[i] = simd_sum(a[i]);"),
        lambda a: np.where(a < 32, 496.0, 284.0),
    ),
    (
        "a whole SIMD-group that returns before a SIMD-group function of the others",
        lambda: run(I + "o[i] = a[i]; if (i >= 32) return; o[i] = simd_broadcast(a[i], 3);", threadgroup=40),
        lambda a: np.where(a < 32, 3.0, a),
    ),
    (
        "a threadgroup variable in a loop keeps its place",
        lambda: run(
            I + "float s = 0; for (int k = 0; k < 3; ++k) { threadgroup float t[32]; t[i] = a[i]; "
            "simdgroup_barrier(mem_flags::mem_threadgroup); s += t[31 - i]; "
            "simdgroup_barrier(mem_flags::mem_threadgroup); } o[i] = s;",
            threads=32,
        ),
        lambda a: 3 * a[:32][::-1],
    ),
    (
        "tables in the constant address space",
        lambda: run(I + "o[i] = table[i % 3] + a[i];", header="constant float table[3] = {1.0f, 2.0f, 4.0f};\n"),
        lambda a: a + np.array([1, 2, 4])[a.astype(int) % 3],
    ),
]


@pytest.mark.parametrize(("what", "kind", "plant"), RUNS_WRONG, ids=[fault[0] for fault in RUNS_WRONG])
def test_faults_of_a_running_kernel_are_reported(what: str, kind: str, plant: Callable[[], Any]) -> None:
    with pytest.raises(CheckError) as caught:
        plant()
    findings = caught.value.findings
    assert any(re.search(kind, finding.kind) for finding in findings), str(caught.value)
    located = all(re.search(r"kernel\.metal:\d+.*`.+`", finding.location) for finding in findings)
    assert located or kind in ("unwritten-output", "timeout"), str(caught.value)


@pytest.mark.parametrize(("what", "error", "message", "plant"), REFUSED, ids=[fault[0] for fault in REFUSED])
def test_faults_in_the_text_are_refused(
    what: str, error: type[KernelError], message: str, plant: Callable[[], Any]
) -> None:
    with pytest.raises(error, match=message):
        plant()


@pytest.mark.parametrize(("what", "sound", "expected"), SOUND, ids=[kernel[0] for kernel in SOUND])
def test_sound_kernels_are_not_reported(
    what: str, sound: Callable[[], np.ndarray], expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    np.testing.assert_allclose(sound(), expected(np.arange(40, dtype=np.float32)), rtol=1e-6)


def test_a_finding_names_the_line_thread_and_buffer() -> None:
    with pytest.raises(CheckError) as caught:
        run("uint i = thread_position_in_grid.x;\nfloat x = a[i];\no[i + 1] = x;", threads=33, outputs=33)
    (finding,) = [finding for finding in caught.value.findings if finding.kind == "out-of-bounds"]
    assert finding.location.endswith("`o[i + 1] = x;`")
    assert "thread (0,0,0) of threadgroup (1,0,0), SIMD-group 0 lane 0" in finding.message
    assert "writes 4 bytes at offset 132 of buffer 'o', which has 132" in finding.message


def test_a_finding_in_a_helper_names_both_lines() -> None:
    header = "inline float next(const device float* p) {\n    return p[1];\n}\n"
    with pytest.raises(CheckError, match=r"kernel\.metal:2 \(from kernel\.metal:\d+\) `return p\[1\];`"):
        run(I + "o[i] = next(a + i);", header=header)
