"""The CUDA text of the kernels compiles with NVRTC (no GPU is needed), and its launches cover Metal's grid exactly."""

import itertools
import platform
import sys

import numpy as np
import pytest

from metal_kernels.host import CompileError, metal_kernel, nvrtc
from metal_kernels.host.arrays import dtype_name, to_numpy
from metal_kernels.host.case import Case
from metal_kernels.host.cuda_source import cuda_source, launches
from metal_kernels.host.signature import GeneratedKernel
from tests.absent import absent

from . import samples, test_operations


@pytest.fixture(scope="module")
def cuda_compiler() -> None:
    reason = nvrtc.unavailable_reason()
    if reason is not None:
        installable = sys.platform == "linux" and platform.machine() == "x86_64"
        absent("the kernels' CUDA text", reason, expected=installable)


def generated(case: Case) -> GeneratedKernel:
    arrays = [to_numpy(x) for x in case.call["inputs"]]
    template = [(n, v if isinstance(v, bool | int) else dtype_name(v)) for n, v in case.call["template"]]
    dtypes = [dtype_name(dtype) for dtype in case.call["output_dtypes"]]
    return case.kernel.generate([(dtype_name(x.dtype), x.shape) for x in arrays], dtypes, template)


CASES = [
    *(samples.scan(dtype) for dtype in samples.FLOATS),
    samples.scan(steps=1, channels=1, batch=1, groups=1),
    samples.scan_registers("bfloat16"),
    samples.window_attention(head_dim=32),
    samples.top_k(),
    samples.neighbours(),
]


@pytest.mark.usefixtures("cuda_compiler")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_samples_compile(case: Case) -> None:
    cubin = nvrtc.compile_cuda(case.name, cuda_source(generated(case)))
    assert cubin.startswith(b"\x7fELF")
    assert b"msl_entry" in cubin


EXPRESSIONS = {
    "simd": (test_operations.SIMD, "float32", "float32"),
    "integers": (test_operations.INTEGERS, "uint32", "uint32"),
    "floating": ([e for e in test_operations.FLOATING if "Limits" not in e], "float32", "float32"),
    "half": (["v * v + 2.0f * v - half(3) / v", "metal::exp(v) + 1", "v > 0 ? v : -v"], "float16", "float16"),
    "bfloat": (["v * v - bfloat(3) / v", "bfloat(float(v) + 1.0f)", "v > bfloat(0) ? v : -v"], "bfloat16", "bfloat16"),
}


@pytest.mark.usefixtures("cuda_compiler")
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_the_library_compiles(name: str) -> None:
    expressions, dtype, output_dtype = EXPRESSIONS[name]
    lines = [f"o[{row * 32} + i] = {expression};" for row, expression in enumerate(expressions)]
    kernel = metal_kernel(name, ["x"], ["o"], test_operations.PROLOGUE + "\n".join(lines))
    nvrtc.compile_cuda(name, cuda_source(kernel.generate([(dtype, (32,))], [output_dtype], [])))


@pytest.mark.usefixtures("cuda_compiler")
def test_atomics_and_matrices_compile() -> None:
    atomics = "".join(
        f"atomic_fetch_{operation}_explicit(&o[0], x[0], memory_order_relaxed);"
        for operation in ("add", "sub", "min", "max", "and", "or", "xor")
    )
    kernel = metal_kernel("atomics", ["x"], ["o"], atomics, atomic_outputs=True)
    nvrtc.compile_cuda("atomics", cuda_source(kernel.generate([("uint32", (32,))], ["uint32"], [])))
    for dtype, metal in (("float16", "half"), ("bfloat16", "bfloat")):
        source = f"""simdgroup_matrix<{metal}, 8, 8> a, b({metal}(2.0f)); simdgroup_float8x8 c;
        simdgroup_load(a, x, 8, ulong2(0, 0), true); simdgroup_multiply(c, a, b); simdgroup_store(c, o);"""
        kernel = metal_kernel("matrices", ["x"], ["o"], source)
        nvrtc.compile_cuda("matrices", cuda_source(kernel.generate([(dtype, (64,))], ["float32"], [])))


@pytest.mark.usefixtures("cuda_compiler")
def test_an_error_names_the_kernel_and_line() -> None:
    kernel = metal_kernel("wrong", ["x"], ["o"], "float y = 1;\no[0] = nothing;")
    with pytest.raises(CompileError, match=r"wrong: CUDA compilation\s+kernel\.metal\(5\): error: .*nothing"):
        nvrtc.compile_cuda("wrong", cuda_source(kernel.generate([("float32", (32,))], ["float32"], [])))


@pytest.mark.parametrize(
    ("grid", "threadgroup"),
    [
        ((5, 3, 2), (4, 2, 1)),
        ((70, 1, 1), (64, 1, 1)),
        ((33, 5, 7), (8, 8, 2)),
        ((4, 4, 4), (4, 4, 4)),
        ((3, 1, 1), (256, 1, 1)),
    ],
)
def test_launches_cover_the_grid_once(grid: tuple[int, int, int], threadgroup: tuple[int, int, int]) -> None:
    covered = np.zeros(grid, int)
    size = [min(extent, wanted) for extent, wanted in zip(grid, threadgroup, strict=True)]
    for launch in launches(grid, threadgroup):
        for block in itertools.product(*(range(count) for count in launch.blocks)):
            start = [(launch.first[k] + block[k]) * size[k] for k in range(3)]
            covered[tuple(slice(start[k], start[k] + launch.size[k]) for k in range(3))] += 1
    assert (covered == 1).all()


def test_launches_are_one_where_sizes_divide() -> None:
    assert len(list(launches((64, 4, 2), (32, 2, 1)))) == 1
    assert len(list(launches((65, 5, 3), (32, 2, 2)))) == 8
