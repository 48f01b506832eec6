"""Runs the CUDA text of a Metal kernel on an NVIDIA GPU with CuPy, called like the kernel itself. No clang, no MLX."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arrays import dtype_name, is_mlx, memory_of, numpy_dtype, to_mlx, to_numpy
from .cuda_source import OPTIONS, cuda_source, launches
from .kernel import HostKernel, metal_kernel
from .toolchain import INCLUDE


class Dispatch:
    """One call of a kernel with its buffers on the GPU; may be launched again and again."""

    def __init__(
        self,
        kernel: HostKernel,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[Any],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]],
        init_value: float | None,
    ) -> None:
        import cupy  # type: ignore[import-not-found]  # only a machine with a GPU has it

        cupy.cuda.set_allocator(None)  # each buffer an allocation of its own, so that memcheck knows its bounds
        self.name, self._grid, self._threadgroup, self._init_value = kernel.name, grid, threadgroup, init_value
        arrays = [to_numpy(x) for x in inputs]
        if kernel.ensure_row_contiguous:
            arrays = [x if x.flags.c_contiguous else np.ascontiguousarray(x) for x in arrays]
        dtypes = [dtype_name(dtype) for dtype in output_dtypes]
        named_template = [(name, v if isinstance(v, bool | int) else dtype_name(v)) for name, v in template]
        generated = kernel.generate([(dtype_name(x.dtype), x.shape) for x in arrays], dtypes, named_template)
        self._entry, self._buffers, self._outputs = _entry(cuda_source(generated)), [], []
        for parameter in generated.parameters:
            if parameter.kind == "output":
                dtype, shape = numpy_dtype(dtypes[parameter.index]), tuple(output_shapes[parameter.index])
                buffer = cupy.empty(max(int(np.prod(shape)) * dtype.itemsize, 1), cupy.uint8)
                self._outputs.append((buffer, dtype, shape))
            else:
                content, first = _input_bytes(parameter.kind, arrays[parameter.index])
                buffer = cupy.asarray(np.frombuffer(content, np.uint8))[first:]
            self._buffers.append(buffer)

    def launch(self, poison: bool) -> None:
        """Runs it; poison: outputs are filled with 0xFF before (NaN), else left as they are, as initcheck needs it."""
        for buffer, dtype, shape in self._outputs:
            if self._init_value is not None:
                buffer.set(np.full(shape, self._init_value, dtype).reshape(-1).view(np.uint8))
            elif poison:
                buffer.fill(0xFF)
        sizes = tuple(min(extent, wanted) for extent, wanted in zip(self._grid, self._threadgroup, strict=True))
        for launch in launches(self._grid, self._threadgroup):
            numbers = map(np.uint32, (*launch.first, *self._grid, *sizes))
            self._entry(launch.blocks, launch.size, (*self._buffers, *numbers))

    def outputs(self) -> list[np.ndarray]:
        """What the last launch wrote."""
        return [
            buffer.get().view(dtype)[: int(np.prod(shape))].reshape(shape) for buffer, dtype, shape in self._outputs
        ]

    def repeats_that_differ(self, repeats: int) -> int:
        """How many of so many further launches give other bits than the last one; compared on the GPU."""
        import cupy  # type: ignore[import-not-found]

        first = [buffer.copy() for buffer, _, _ in self._outputs]
        different = cupy.zeros((), cupy.int64)
        for _ in range(repeats):
            self.launch(poison=True)
            for (buffer, _, _), before in zip(self._outputs, first, strict=True):
                different += (buffer != before).any()
        return int(different.get())


@dataclass
class Recording:
    """What runs in a block of `recording`: whether outputs are poisoned, and the dispatches so far."""

    poison: bool
    dispatches: list[Dispatch] = field(default_factory=list)


_current: ContextVar[Recording | None] = ContextVar("_current", default=None)


@contextmanager
def recording(poison: bool = True) -> Iterator[list[Dispatch]]:
    """The dispatches that kernels make within the block."""
    here = Recording(poison)
    token = _current.set(here)
    try:
        yield here.dispatches
    finally:
        _current.reset(token)


def run_on_gpu(
    kernel: HostKernel,
    *,
    inputs: Sequence[Any],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[Any],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    template: Sequence[tuple[str, Any]] | None = None,
    init_value: float | None = None,
) -> list[Any]:
    """The outputs, MLX arrays if it got some, else NumPy arrays; the arguments are those of a kernel's call."""
    here = _current.get() or Recording(poison=True)
    arguments = (output_shapes, output_dtypes, grid, threadgroup, template or (), init_value)
    dispatch = Dispatch(kernel, inputs, *arguments)
    dispatch.launch(here.poison)
    here.dispatches.append(dispatch)
    outputs = dispatch.outputs()
    return [to_mlx(x) for x in outputs] if any(is_mlx(x) for x in inputs) else outputs


def gpu_metal_kernel(*args: Any, **kwargs: Any) -> Any:
    """mx.fast.metal_kernel, run on an NVIDIA GPU: the same arguments."""
    return functools.partial(run_on_gpu, metal_kernel(*args, **kwargs))


@functools.cache
def _entry(source: str) -> Any:
    import cupy  # type: ignore[import-not-found]

    module = cupy.RawModule(code=source, backend="nvrtc", options=(*OPTIONS, f"-I{INCLUDE}"))
    return module.get_function("msl_entry")


def _input_bytes(kind: str, x: np.ndarray) -> tuple[bytes, int]:
    """The bytes of a buffer, and where in them the kernel's pointer points."""
    if kind == "shape":
        return np.array(x.shape, np.int32).tobytes(), 0
    if kind == "strides":
        return np.array([stride // x.itemsize for stride in x.strides], np.int64).tobytes(), 0
    if kind == "ndim":
        return np.array(x.ndim, np.int32).tobytes(), 0
    content, first = memory_of(x)
    return content or b"\0", first
