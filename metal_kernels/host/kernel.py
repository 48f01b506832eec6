"""A Metal kernel on this machine's CPU, called as MLX's own: `metal_kernel` has mx.fast.metal_kernel's signature.

Inputs and outputs are NumPy or MLX arrays. It runs at once: no laziness, no gradients, no mx.compile or mx.vmap.
"""

import math
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .arrays import dtype_name, is_mlx, memory_of, numpy_dtype, to_mlx, to_numpy
from .compile import Mode, compile_kernel
from .errors import CheckError, Finding
from .lint import require_clean
from .runtime import Dispatch, Order, Statistics, lock
from .signature import Array, GeneratedKernel, Parameter, Template, generate
from .typecheck import typecheck

MAX_THREADS = 1024  # per threadgroup; Apple's limit for a given kernel can be lower


@dataclass(frozen=True)
class Run:
    """How kernels are run.

    mode: "check" reports races, out-of-bounds and uninitialised accesses, unwritten outputs and undefined arithmetic;
    "fast" is for numbers, 3 to 10 times faster, and reports only divergence, crashes and timeouts.
    order: in which order lanes, SIMD-groups and threadgroups take turns, where the kernel leaves it open; `seed` is for
    "shuffled". workers: host threads ("fast" only). timeout_s: a dispatch runs in a child process for at most so long;
    0 runs it in this one, where a crash of the kernel is a crash. input_offset: elements from a page boundary to each
    input, as MLX passes a slice. source_checks: lint and type check first.
    """

    mode: Mode = "check"
    order: Order = "forward"
    seed: int = 1
    workers: int = 1
    timeout_s: int = 120
    divergence: Literal["report", "allow"] = "report"
    unwritten: Literal["report", "allow"] = "report"
    input_offset: int = 0
    source_checks: bool = True

    def __post_init__(self) -> None:
        if self.mode == "check" and self.workers != 1:
            raise ValueError("Run: the checker has one shadow memory, so mode 'check' takes workers=1")


default_run: ContextVar[Run] = ContextVar("default_run", default=Run())  # noqa: B039 - Run is immutable


class HostKernel:
    """A kernel ready to be called; made by `metal_kernel`."""

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        math_mode: str = "safe",
    ) -> None:
        if not output_names:
            raise ValueError("[metal_kernel] Must specify at least one output.")
        self.name = name
        self.input_names = list(input_names)
        self.output_names = list(output_names)
        self.source = source
        self.header = header
        self.ensure_row_contiguous = ensure_row_contiguous
        self.atomic_outputs = atomic_outputs
        self.math_mode = math_mode
        self.statistics: Statistics | None = None  # of the last call
        self._compiled: dict[tuple[str, Mode, bool], Path] = {}

    def with_source(self, source: str) -> "HostKernel":
        """The same kernel with another body."""
        arrays = (self.input_names, self.output_names)
        options = (self.ensure_row_contiguous, self.atomic_outputs, self.math_mode)
        return HostKernel(self.name, *arrays, source, self.header, *options)

    def generate(self, inputs: Sequence[Array], output_dtypes: Sequence[str], template: Template) -> GeneratedKernel:
        """The full text for inputs of these dtypes and shapes."""
        return generate(
            self.name,
            self.header,
            self.source,
            self.input_names,
            inputs,
            self.output_names,
            output_dtypes,
            template,
            self.atomic_outputs,
        )

    def compile(self, kernel: GeneratedKernel, template: Template, run: Run) -> Path:
        """Lint, type check and compilation of one text. Raises `LintError`, `TypeCheckError`, `CompileError`."""
        key = (kernel.text, run.mode, run.source_checks)
        if key not in self._compiled:
            if run.source_checks:
                type_names = [name for name, value in template if isinstance(value, str)]
                require_clean(self.name, self.header, self.source, type_names)
                typecheck(self.name, kernel.text)
            self._compiled[key] = compile_kernel(self.name, kernel, run.mode, self.math_mode)
        return self._compiled[key]

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[Any],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
        run: Run | None = None,
    ) -> list[Any]:
        """Runs the kernel and returns its outputs: NumPy arrays if it got NumPy arrays and no MLX one, else MLX arrays.

        Arguments are MLX's, and `run`. Raises `ValueError` where MLX does, and an error of errors.py for a kernel that
        is wrong: `CheckError` when it ran and did something wrong.
        """
        run = run or default_run.get()
        self._check_call(inputs, output_shapes, output_dtypes, grid, threadgroup, stream)
        arrays = [to_numpy(x) for x in inputs]
        if self.ensure_row_contiguous:
            arrays = [x if x.flags.c_contiguous else np.ascontiguousarray(x) for x in arrays]
        dtypes = [dtype_name(dtype) for dtype in output_dtypes]
        named_template = [(name, v if isinstance(v, bool | int) else dtype_name(v)) for name, v in template or ()]
        kernel = self.generate([(dtype_name(x.dtype), x.shape) for x in arrays], dtypes, named_template)
        if verbose:
            print(f"Generated source code for `{self.name}`:\n```\n{kernel.text}\n```")
        library = self.compile(kernel, named_template, run)
        with lock:
            outputs = self._dispatch(library, kernel, arrays, output_shapes, dtypes, grid, threadgroup, init_value, run)
        wants_numpy = any(isinstance(x, np.ndarray) for x in inputs) and not any(is_mlx(x) for x in inputs)
        return outputs if wants_numpy else [to_mlx(x) for x in outputs]

    def _dispatch(
        self,
        library: Path,
        kernel: GeneratedKernel,
        arrays: Sequence[np.ndarray],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[str],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        init_value: float | None,
        run: Run,
    ) -> list[np.ndarray]:
        dispatch = Dispatch(library, run.mode == "check")
        views: dict[int, np.ndarray] = {}  # by buffer
        for parameter in kernel.parameters:
            if parameter.kind == "output":
                name, shape = self.output_names[parameter.index], output_shapes[parameter.index]
                dtype = numpy_dtype(output_dtypes[parameter.index])
                buffer = len(dispatch.addresses)
                views[buffer] = dispatch.add_output(name, tuple(shape), dtype, init_value)
            else:
                self._add_input(dispatch, parameter, arrays[parameter.index], run)
        findings = dispatch.run(
            grid,
            threadgroup,
            order=run.order,
            seed=run.seed,
            workers=run.workers,
            timeout_s=run.timeout_s,
            allow_divergence=run.divergence == "allow",
        )
        self.statistics = dispatch.statistics()
        if run.mode == "check" and run.unwritten == "report" and not findings:
            findings = self._unwritten(dispatch, views)
        if findings:
            raise CheckError(self.name, [_with_text(finding, kernel.text) for finding in findings])
        return [view.copy() for view in views.values()]

    def _add_input(self, dispatch: Dispatch, parameter: Parameter, x: np.ndarray, run: Run) -> None:
        name = parameter.name(self.input_names)
        if parameter.kind == "input":
            content, first = memory_of(x)
            dispatch.add_input(name, content, first, x.itemsize, run.input_offset * x.itemsize)
            return
        values = {
            "shape": np.array(x.shape, np.int32),
            "strides": np.array([stride // x.itemsize for stride in x.strides], np.int64),
            "ndim": np.array(x.ndim, np.int32),
        }[parameter.kind]
        dispatch.add_input(name, values.tobytes(), 0, values.itemsize)

    def _unwritten(self, dispatch: Dispatch, views: dict[int, np.ndarray]) -> list[Finding]:
        findings = []
        for name, (buffer, view) in zip(self.output_names, views.items(), strict=True):
            count, first = dispatch.unwritten(buffer)
            if count:
                element = first // max(view.itemsize, 1)
                findings.append(
                    Finding("unwritten-output", name, f"{count} elements are never written, the first is {element}")
                )
        return findings

    def _check_call(
        self,
        inputs: Sequence[Any],
        output_shapes: Sequence[Any],
        output_dtypes: Sequence[Any],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        stream: Any,
    ) -> None:
        for what, got, names in (
            ("inputs", inputs, self.input_names),
            ("output_shapes", output_shapes, self.output_names),
            ("output_dtypes", output_dtypes, self.output_names),
        ):
            if len(got) != len(names):
                raise ValueError(f"[metal_kernel] Expected `{what}` to have size {len(names)} but got size {len(got)}.")
        for what, size in (("grid", grid), ("threadgroup", threadgroup)):
            if len(size) != 3 or min(size) < 1:
                raise ValueError(f"[metal_kernel] `{what}` must be three positive numbers, not {tuple(size)}.")
        if math.prod(threadgroup) > MAX_THREADS:
            raise ValueError(
                f"Thread group size ({math.prod(threadgroup)}) is greater than the maximum allowed threads per "
                f"threadgroup ({MAX_THREADS})."
            )
        if stream is not None and "cpu" in str(stream):
            raise ValueError("[metal_kernel] Only supports the GPU.")


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: dict[str, Any] | None = None,
) -> HostKernel:
    """mx.fast.metal_kernel, run here: the same arguments, and a kernel with the same call.

    Arithmetic here is that of MLX's default math mode, "safe"; "fast" defines __FAST_MATH__ and nothing more.
    """
    modes = ("safe", "relaxed", "fast")
    for key, value in (compile_options or {}).items():
        if key != "math_mode" or value not in modes:
            raise ValueError(f"compile_options[{key!r}] = {value!r}: MLX takes 'math_mode', one of {modes}")
    mode = (compile_options or {}).get("math_mode", "safe")
    return HostKernel(name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs, mode)


def _with_text(finding: Finding, text: str) -> Finding:
    """Adds the line that a finding is about to its place."""
    lines = text.split("\n")
    _, _, number = finding.location.split(" ")[0].partition("kernel.metal:")
    if not number.isdigit() or int(number) > len(lines):
        return finding
    return Finding(finding.kind, f"{finding.location} `{lines[int(number) - 1].strip()}`", finding.message)
