"""Runs the CUDA text of a Metal kernel on an NVIDIA GPU with CuPy, called like the kernel itself. No clang, no MLX."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import dtype_name, memory_of, numpy_dtype, to_numpy
from .cuda_source import OPTIONS, cuda_source, launches
from .kernel import HostKernel
from .toolchain import INCLUDE


def run_on_gpu(
    kernel: HostKernel,
    *,
    inputs: Sequence[Any],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[Any],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    template: Sequence[tuple[str, Any]] = (),
    init_value: float | None = None,
    poison: bool = True,
) -> list[np.ndarray]:
    """The kernel's outputs as NumPy arrays; the arguments are those of a kernel's call.

    poison: outputs are filled with 0xFF before (NaN); False leaves them unset, as initcheck needs it.
    """
    import cupy  # type: ignore[import-not-found]  # only a machine with a GPU has it

    cupy.cuda.set_allocator(None)  # each buffer an allocation of its own, so that memcheck knows its bounds
    arrays = [np.ascontiguousarray(x) if x.ndim else x for x in map(to_numpy, inputs)]
    dtypes = [dtype_name(dtype) for dtype in output_dtypes]
    named_template = [(name, v if isinstance(v, bool | int) else dtype_name(v)) for name, v in template]
    generated = kernel.generate([(dtype_name(x.dtype), x.shape) for x in arrays], dtypes, named_template)
    entry = _entry(cuda_source(generated))

    buffers, outputs = [], []
    for parameter in generated.parameters:
        if parameter.kind == "output":
            dtype = numpy_dtype(dtypes[parameter.index])
            shape = tuple(output_shapes[parameter.index])
            buffer = cupy.empty(max(int(np.prod(shape)) * dtype.itemsize, 1), cupy.uint8)
            if init_value is not None:
                buffer[:] = cupy.asarray(np.full(shape, init_value, dtype).reshape(-1).view(np.uint8))
            elif poison:
                buffer[:] = 0xFF
            outputs.append((buffer, dtype, shape))
        else:
            buffer = cupy.asarray(np.frombuffer(_input_bytes(parameter.kind, arrays[parameter.index]), np.uint8))
        buffers.append(buffer)
    sizes = tuple(min(extent, wanted) for extent, wanted in zip(grid, threadgroup, strict=True))
    for launch in launches(grid, threadgroup):
        entry(launch.blocks, launch.size, (*buffers, *map(np.uint32, (*launch.first, *grid, *sizes))))
    cupy.cuda.Device().synchronize()
    return [buffer.get().view(dtype)[: int(np.prod(shape))].reshape(shape) for buffer, dtype, shape in outputs]


@functools.cache
def _entry(source: str) -> Any:
    import cupy  # type: ignore[import-not-found]

    module = cupy.RawModule(code=source, backend="nvrtc", options=(*OPTIONS, f"-I{INCLUDE}"))
    return module.get_function("msl_entry")


def _input_bytes(kind: str, x: np.ndarray) -> bytes:
    if kind == "shape":
        return np.array(x.shape, np.int32).tobytes()
    if kind == "strides":
        return np.array([stride // x.itemsize for stride in x.strides], np.int64).tobytes()
    if kind == "ndim":
        return np.array(x.ndim, np.int32).tobytes()
    return memory_of(x)[0] or b"\0"
