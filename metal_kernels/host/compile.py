"""From the text of a kernel to a shared object with one entry: msl_entry(void** arguments, const msl_thread*)."""

import tempfile
from pathlib import Path
from typing import Literal

from .errors import CompileError
from .rewrite import rewrite
from .runtime import runtime_library
from .signature import GeneratedKernel
from .toolchain import KERNEL_FLAGS, MODE_FLAGS, cached, compile_with, include_flags

Mode = Literal["fast", "check"]

# Each thread attribute out of `thread_id`, an msl_thread (include/msl/thread_id.h).
ATTRIBUTE_VALUES = {
    "thread_position_in_grid": "MSL_UINT3(thread_id->position_in_grid)",
    "thread_position_in_threadgroup": "MSL_UINT3(thread_id->position_in_threadgroup)",
    "threadgroup_position_in_grid": "MSL_UINT3(thread_id->threadgroup_position)",
    "threadgroups_per_grid": "MSL_UINT3(thread_id->threadgroups_per_grid)",
    "threads_per_grid": "MSL_UINT3(thread_id->threads_per_grid)",
    "grid_size": "MSL_UINT3(thread_id->threads_per_grid)",
    "grid_origin": "uint3(0u)",
    "threads_per_threadgroup": "MSL_UINT3(thread_id->threads_per_threadgroup)",
    "dispatch_threads_per_threadgroup": "MSL_UINT3(thread_id->dispatch_threads_per_threadgroup)",
    "thread_index_in_threadgroup": "thread_id->index_in_threadgroup",
    "thread_index_in_simdgroup": "thread_id->lane",
    "thread_index_in_quadgroup": "thread_id->lane % 4",
    "simdgroup_index_in_threadgroup": "thread_id->simdgroup",
    "quadgroup_index_in_threadgroup": "thread_id->index_in_threadgroup / 4",
    "simdgroups_per_threadgroup": "thread_id->simdgroups_per_threadgroup",
    "quadgroups_per_threadgroup": "(MSL_COUNT(thread_id->threads_per_threadgroup) + 3) / 4",
    "dispatch_simdgroups_per_threadgroup": "(MSL_COUNT(thread_id->dispatch_threads_per_threadgroup) + 31) / 32",
    "dispatch_quadgroups_per_threadgroup": "(MSL_COUNT(thread_id->dispatch_threads_per_threadgroup) + 3) / 4",
    "thread_execution_width": "32u",
    "threads_per_simdgroup": "32u",
}


def compile_kernel(name: str, kernel: GeneratedKernel, mode: Mode, math_mode: str = "safe") -> Path:
    """The shared object of a kernel, compiled now or taken from the cache. Raises `CompileError`."""
    source = f"{rewrite(kernel.text)}\n{_entry(kernel)}"
    defines = ["-D__FAST_MATH__=1"] if math_mode == "fast" else []

    def build(output: Path) -> None:
        headers = ["-include", "msl/host.h", "-include", "mlx/backend/metal/kernels/utils.h"]
        flags = [*KERNEL_FLAGS, *MODE_FLAGS[mode], *defines, *include_flags(), *headers]
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "kernel.metal"  # findings get their places from this name and its lines
            text.write_text(source)
            try:
                compile_with([*flags, "-x", "c++", str(text), "-x", "none", str(runtime_library()), "-o", str(output)])
            except CompileError as error:
                raise CompileError(f"{name}: compilation\n{error}") from None

    return cached(f"{mode} {defines} {source}", build)


def _entry(kernel: GeneratedKernel) -> str:
    arguments = []
    for index, parameter in enumerate(kernel.parameters):
        const = "" if parameter.kind == "output" else "const "
        value = f"({const}{parameter.metal_type}*)arguments[{index}]"
        arguments.append(f"*{value}" if parameter.by_reference else value)
    arguments += [ATTRIBUTE_VALUES[attribute] for attribute in kernel.attributes]
    call = f"{kernel.function}{kernel.template_arguments}({', '.join(arguments)})"
    return (
        "#define MSL_UINT3(v) uint3((v)[0], (v)[1], (v)[2])\n"
        "#define MSL_COUNT(v) ((v)[0] * (v)[1] * (v)[2])\n"
        '__attribute__((no_sanitize("thread")))\n'
        f'extern "C" void msl_entry(void** arguments, const msl_thread* thread_id) {{ {call}; }}\n'
    )
