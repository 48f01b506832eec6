"""Which implementation runs, how a kernel is made of its text and launched, and checks of what it is given.

It knows no kernel. A kernel is a body file `<name>.metal` behind the helpers of `common.metal`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
SIMD = 32  # threads of a SIMD-group

_chosen: ContextVar[bool | None] = ContextVar("_chosen", default=None)
_exported: ContextVar[bool] = ContextVar("_exported", default=False)


def kernels_available() -> bool:
    """Whether ops run their Metal kernels: on an Apple GPU, unless `use_kernels` says otherwise."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


@contextmanager
def use_kernels(on: bool) -> Iterator[None]:
    """Within the block, Metal kernels (on) or the plain ops (off) run, whatever the machine.

    On a machine without Metal something must stand in for mx.fast.metal_kernel, or calling a kernel raises.
    """
    token = _chosen.set(on)
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def exported() -> Iterator[None]:
    """Within the block, ops are made of what MLX can write to a file: kernels without gradients, no `mx.contiguous`."""
    token = _exported.set(True)
    try:
        yield
    finally:
        _exported.reset(token)


def contiguous(x: mx.array) -> mx.array:
    """x as a strided kernel's inputs that are read without strides must be; exported kernels see to that themselves."""
    return x if _exported.get() else mx.contiguous(x)


@dataclass(frozen=True)
class Kernel:
    """The kernel of the body file `<name>.metal`.

    strided: inputs are read through their strides, not copied, unless exported; helpers: header files behind
    `common.metal`.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    strided: bool = False
    helpers: tuple[str, ...] = ()

    def __call__(
        self,
        inputs: Sequence[Any],
        outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] = (),
    ) -> list[mx.array]:
        """Outputs of these shapes and dtypes; the grid counts threads."""
        return _made(self, mx.fast.metal_kernel, self.strided and not _exported.get())(
            inputs=list(inputs),
            output_shapes=[tuple(shape) for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            grid=grid,
            threadgroup=threadgroup,
            template=list(template),
        )


def text(name: str) -> str:
    """What the file `<name>.metal` of this package says."""
    return (Path(__file__).parent / f"{name}.metal").read_text(encoding="ascii")


@cache
def _made(kernel: Kernel, maker: Callable[..., Any], strided: bool) -> Any:
    return maker(
        name=f"bmojo_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=text(kernel.name),
        header="\n".join(text(name) for name in ("common", *kernel.helpers)),
        ensure_row_contiguous=not strided,
    )


def with_gradient(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` of arrays, with the gradient of `reference`, which computes the same of the same arrays."""
    if _exported.get():
        return kernel
    function = mx.custom_function(kernel)

    @function.vjp
    def _(primals: Any, cotangents: Any, _outputs: Any) -> Any:
        _, gradients = mx.vjp(reference, _listed(primals), _listed(cotangents))
        return tuple(gradients)

    return function


def _listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, tuple | list) else [x]


def rounded_up(n: int, multiple: int) -> int:
    """The least multiple that is at least n."""
    return -(-n // multiple) * multiple


def require_shapes(op: str, **arrays: tuple[mx.array, Sequence[int]]) -> None:
    """Each name's array must have the shape beside it."""
    for name, (array, shape) in arrays.items():
        if tuple(array.shape) != tuple(shape):
            raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(array.shape)}")


def require_dtypes(op: str, dtypes: Sequence[mx.Dtype], **arrays: mx.array) -> None:
    """Each name's array must have one of the dtypes."""
    for name, array in arrays.items():
        if array.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("mlx.core.") for dtype in dtypes)
            got = str(array.dtype).removeprefix("mlx.core.")
            raise ValueError(f"{op}: {name} must be {allowed}, got {got}; convert it with astype")
