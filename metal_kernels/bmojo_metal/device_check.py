"""Every kernel against its plain op on this machine's GPU: all dtypes, sizes that divide nothing, and their times.

The plain op runs on the CPU in float32, on inputs that the dtype holds: GPUs may multiply float32 in fewer bits. Knows
no machine and prints nothing; `bmojo-edge doctor` does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from bmojo_metal.attention import Band, Pinned, Queries, memory_attention
from bmojo_metal.attention_step import Slots, memory_attention_step
from bmojo_metal.conv import silu_conv
from bmojo_metal.launch import FLOATS, use_kernels
from bmojo_metal.linear import Linear, linear_wide
from bmojo_metal.norm import add_rms_norm
from bmojo_metal.rotation import Rotary, rotate_token
from bmojo_metal.scan import selective_scan
from bmojo_metal.scan_step import MambaWeights, selective_scan_step
from bmojo_metal.selection import Eidetic, Ring, innovation_scores, innovation_step, promote, select_eidetic

# RMS error over RMS allowed. In float32 orders of summing and two libraries' exp differ; nothing is rounded besides.
BOUNDS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
REPEATS = 5  # timed calls, of which the median counts


class Sizes(NamedTuple):
    """How large the arrays of a check are; names as in the ops."""

    b: int
    t: int
    d: int
    n: int
    h: int
    g: int
    p: int
    window: int
    n_fading: int
    n_sinks: int
    n_eidetic: int


TINY = Sizes(b=1, t=2, d=3, n=3, h=1, g=1, p=4, window=1, n_fading=1, n_sinks=1, n_eidetic=1)
ODD = Sizes(b=3, t=37, d=45, n=16, h=6, g=2, p=20, window=33, n_fading=7, n_sinks=3, n_eidetic=5)
LONG = Sizes(b=1, t=300, d=9, n=5, h=4, g=4, p=72, window=200, n_fading=190, n_sinks=0, n_eidetic=9)
TOKEN = Sizes(b=2, t=1, d=70, n=16, h=8, g=2, p=32, window=40, n_fading=0, n_sinks=2, n_eidetic=9)
CHECKED = (TINY, ODD, LONG, TOKEN)
TYPICAL = Sizes(b=1, t=512, d=2048, n=16, h=16, g=4, p=64, window=512, n_fading=512, n_sinks=4, n_eidetic=256)


@dataclass(frozen=True)
class Case:
    """One call of an op. `arguments` makes its arrays in a dtype; `call` takes them and returns the op's outputs."""

    op: str
    dtype: mx.Dtype
    sizes: Sizes
    arguments: Callable[[Inputs], tuple[Any, ...]]
    call: Callable[..., Sequence[mx.array]]


@dataclass(frozen=True)
class Check:
    """What became of a case. error: the largest RMS-error ratio of its outputs; problem: why it failed, None if not."""

    op: str
    dtype: str
    sizes: Sizes
    error: float | None
    problem: str | None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call at `TYPICAL` sizes, of the kernel and of the plain op on the same device."""

    op: str
    dtype: str
    kernel_ms: float
    plain_ms: float


@dataclass
class Inputs:
    """Random arrays of one case: the same for every dtype but for rounding. wide: in float32 after rounding."""

    dtype: mx.Dtype
    wide: bool
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def __call__(self, *shape: int, deviation: float = 1.0) -> mx.array:
        """Normal values in the dtype."""
        return self.rounded(self.float32(*shape, deviation=deviation))

    def rounded(self, x: mx.array) -> mx.array:
        """Values as the dtype has them."""
        x = x.astype(self.dtype)
        return x.astype(mx.float32) if self.wide else x

    def float32(self, *shape: int, deviation: float = 1.0) -> mx.array:
        """Normal values in float32 whatever the dtype."""
        return mx.array((self.random.standard_normal(shape) * deviation).astype(np.float32))


# --- the ops ----------------------------------------------------------------------------------------------------------


def _scan_arguments(z: Sizes, t: int) -> Callable[[Inputs], tuple[Any, ...]]:
    def arguments(new: Inputs) -> tuple[Any, ...]:
        both, A_log = new(z.b, t, 2 * z.d), mx.log(mx.arange(1, z.n + 1, dtype=mx.float32))
        steps, BC = new.float32(z.b, t, z.d) - 2, new(z.b, t, 2 * z.n)
        x, gate = mx.split(both, 2, axis=-1)
        B, C = mx.split(BC, 2, axis=-1)
        A_log = mx.contiguous(mx.broadcast_to(A_log, (z.d, z.n)))
        return x, steps, A_log, B, C, new.float32(z.d), gate, new.float32(z.b, z.d, z.n)

    return arguments


def _ragged(b: int, t: int) -> mx.array:
    """Real tokens of each row: all, fewer, ... none in the last of several."""
    return mx.array([t - i * t // max(b - 1, 1) for i in range(b)], mx.int32)


def _mamba(z: Sizes) -> Callable[[Inputs], tuple[Any, ...]]:
    """One token of a block whose dt has rank n; a row of several rests."""

    def arguments(new: Inputs) -> tuple[Any, ...]:
        A_log = mx.broadcast_to(mx.log(mx.arange(1, z.n + 1, dtype=mx.float32)), (z.d, z.n))
        x_proj, dt_proj = new(3 * z.n, z.d, deviation=z.d**-0.5), new(z.d, z.n, deviation=z.n**-0.5)
        weights = MambaWeights(
            new(z.d, 4),
            new(z.d),
            Linear(x_proj),
            Linear(dt_proj, new.float32(z.d) - 2),
            (new(z.n), new(z.n), new(z.n)),
            1e-5,
            mx.contiguous(A_log),
            new.float32(z.d),
        )
        active = mx.array([i != 1 for i in range(z.b)])
        return new(z.b, 2 * z.d), new(z.b, 3, z.d), new.float32(z.b, z.d, z.n), weights, active

    return arguments


def _packed(z: Sizes, bits: int) -> Callable[[Inputs], tuple[Any, ...]]:
    """A vector of whole groups of 32 and a weight that is packed, or is not (bits 0), with a bias."""
    k = -(-z.d // 32) * 32

    def arguments(new: Inputs) -> tuple[Any, ...]:
        x, weight, bias = new(z.b, k), new(z.d, k), new(z.d)
        if not bits:
            return x, Linear(weight, bias)
        packed, scales, offsets = mx.quantize(weight.astype(mx.float32), 32, bits, stream=mx.cpu)  # alike everywhere
        return x, Linear(packed, bias, new.rounded(scales), new.rounded(offsets), 32, bits)

    return arguments


def _turns(z: Sizes) -> Callable[[Inputs], tuple[Any, ...]]:
    def arguments(new: Inputs) -> tuple[Any, ...]:
        def rotary(rows: int) -> Rotary:
            angle = new.float32(rows, 1, 1, 1, z.p // 2)
            return Rotary(mx.cos(angle), mx.concatenate([-mx.sin(angle), mx.sin(angle)], axis=-2))

        own, pinned = rotary(z.b), rotary(1)
        q, k, faded = new(z.b, z.h, 1, z.p), new(z.b, z.g, 1, z.p), new(z.b, z.g, 1, z.p)
        return [q, k, q, faded], [own, own, pinned, own]

    return arguments


def _slots(z: Sizes) -> Callable[[Inputs], tuple[Any, ...]]:
    chunk = max(z.window // 2, 1)

    def arguments(new: Inputs) -> tuple[Any, ...]:
        at = chunk * (2 + (z.window + z.n_eidetic) // chunk)
        held = np.full((z.b, z.n_eidetic), -1)
        held[:, : at - z.window] = np.arange(min(z.n_eidetic, at - z.window))
        ring = Ring(new(z.b, z.g, z.window, z.p), new(z.b, z.g, z.window, z.p), mx.abs(new.float32(z.b, z.window)))
        scores = mx.abs(new.float32(z.b, z.n_eidetic))
        old = Eidetic(new(z.b, z.g, z.n_eidetic, z.p), new(z.b, z.g, z.n_eidetic, z.p), scores, mx.array(held))
        angle = new.float32(z.b, chunk, z.p // 2)
        rows = mx.array([i % 2 == 0 for i in range(z.b)])
        return ring, old, mx.array([at] * z.b, mx.int64), rows, chunk, (mx.cos(angle), mx.sin(angle))

    return arguments


def _promoted(ring: Ring, old: Eidetic, position: mx.array, rows: mx.array, chunk: int, turn: Any) -> Eidetic:
    return promote(ring, old, position, rows, chunk, 0, turn)


def _chosen(z: Sizes) -> Callable[[Inputs], tuple[Any, ...]]:
    def arguments(new: Inputs) -> tuple[Any, ...]:
        scores = mx.round(mx.abs(new.float32(z.b, z.t)) * 4) / 4  # few levels: most of them tie
        position = mx.broadcast_to(mx.arange(z.t, dtype=mx.int64), (z.b, z.t))
        limits = mx.array([[z.t // 2, z.t]] * z.b, mx.int64)
        return scores, mx.contiguous(position), limits, z.n_eidetic

    return arguments


def _prefill(z: Sizes) -> Callable[[Inputs], tuple[Any, ...]]:
    """All rows have seen window + n_fading tokens before; three chunks read different columns."""

    def arguments(new: Inputs) -> tuple[Any, ...]:
        start, far = z.window + z.n_fading, z.window + z.n_fading
        q, k, v = new(z.b, z.h, z.t, z.p), new(z.b, z.g, z.window + z.t, z.p), new(z.b, z.g, z.window + z.t, z.p)
        bands = [Band(q, k, v, 0, z.window)]
        q, k, v = new(z.b, z.h, z.t, z.p), new(z.b, z.g, far + z.t, z.p), new(z.b, z.g, far + z.t, z.p)
        bands += [Band(q, k, v, z.window, far)] * (z.n_fading > 0)
        n = z.n_sinks + 2 * z.n_eidetic
        held = mx.broadcast_to(mx.arange(n, dtype=mx.int64), (z.b, n))
        columns = np.arange(z.n_eidetic)
        lists = np.stack([columns + shift for shift in (0, z.n_eidetic // 2, z.n_eidetic)]) + z.n_sinks
        lists = np.concatenate([np.tile(np.arange(z.n_sinks), (3, 1)), lists], axis=1).astype(np.int32)
        index = mx.array(np.tile(lists, (z.b, 1, 1)))
        q, k, v = new(z.b, z.h, z.t, z.p), new(z.b, z.g, n, z.p), new(z.b, z.g, n, z.p)
        position = mx.broadcast_to(start + mx.arange(z.t, dtype=mx.int64), (z.b, z.t))
        chunk = mx.broadcast_to(mx.arange(z.t) * 3 // z.t, (z.b, z.t))
        pinned = Pinned(q, k, v, mx.contiguous(held), index, z.window)
        return bands, pinned, Queries((start,) * z.b, position, chunk, {}), z.p**-0.5

    return arguments


def _one_token(z: Sizes) -> Callable[[Inputs], tuple[Any, ...]]:
    def arguments(new: Inputs) -> tuple[Any, ...]:
        def memory(n: int, near: int, held: mx.array | None = None) -> Slots:
            return Slots(new(z.b, z.h, 1, z.p), new(z.b, z.g, n, z.p), new(z.b, z.g, n, z.p), near, held)

        position = mx.array([z.window + i * (z.n_fading + 3) for i in range(z.b)], mx.int64)
        memories = [memory(z.window, 0)]
        if z.n_fading:
            memories.append(memory(z.window + z.n_fading, z.window))
        if z.n_sinks:
            memories.append(memory(z.n_sinks, z.window, mx.arange(z.n_sinks)[None]))
        held = np.tile(np.arange(z.n_eidetic) - 1, (z.b, 1))  # the first is empty, the last perhaps too young
        memories.append(memory(z.n_eidetic, z.window, mx.array(held)))
        return memories, position, z.p**-0.5

    return arguments


def _innovation_of_a_token(z: Sizes) -> Callable[[Inputs], tuple[Any, ...]]:
    def arguments(new: Inputs) -> tuple[Any, ...]:
        position = mx.array([z.window + 5 * i for i in range(z.b)], mx.int64)
        active = mx.array([i % 2 == 0 for i in range(z.b)])
        signal, past, ring = new.float32(z.b, z.d), new.float32(z.b, 3, z.d), mx.abs(new.float32(z.b, z.window))
        return signal, past, ring, position, (0.5, 0.3, 0.2), "relative", active

    return arguments


def cases(sizes: Sequence[Sizes], dtypes: Sequence[mx.Dtype] = FLOATS) -> Iterator[Case]:
    """Every op at these sizes; in all dtypes where it takes them, else in float32."""
    for z in sizes:
        for dtype in dtypes:

            def conv(new: Inputs, z: Sizes = z) -> tuple[Any, ...]:
                wide = new(z.b, z.t, 2 * z.d)
                return wide[..., z.d :], new(z.b, 3, z.d), new(z.d, 4), new(z.d), _ragged(z.b, z.t)

            yield Case("silu_conv", dtype, z, conv, silu_conv)
            yield Case("selective_scan", dtype, z, _scan_arguments(z, z.t), selective_scan)
            yield Case("selective_scan_step", dtype, z, _mamba(z), selective_scan_step)
            if dtype != mx.float32:  # weights of 32 bits are left to MLX
                for bits in (0, 4, 8):
                    yield Case(f"linear_wide, {bits or 16} bits", dtype, z, _packed(z, bits), linear_wide)
            yield Case("rotate_token", dtype, z, _turns(z), rotate_token)

            def add_norm(new: Inputs, z: Sizes = z, dtype: mx.Dtype = dtype) -> tuple[Any, ...]:
                return new(z.b, z.d), new(z.b, z.d), new(z.d), 1e-5, mx.float32 if new.wide else dtype

            yield Case("add_rms_norm", dtype, z, add_norm, add_rms_norm)
            yield Case("memory_attention", dtype, z, _prefill(z), lambda *x: [memory_attention(*x)])
            yield Case("memory_attention_step", dtype, z, _one_token(z), lambda *x: [memory_attention_step(*x)])
            yield Case("promote", dtype, z, _slots(z), _promoted)

        def innovation(new: Inputs, z: Sizes = z) -> tuple[Any, ...]:
            past = new.float32(z.b, 3, z.d)
            return new.float32(z.b, z.t, z.d), past, (0.5, 0.3, 0.2), "relative", _ragged(z.b, z.t)

        yield Case("innovation_scores", mx.float32, z, innovation, innovation_scores)
        yield Case("innovation_step", mx.float32, z, _innovation_of_a_token(z), innovation_step)
        yield Case(
            "select_eidetic", mx.float32, z, _chosen(z), lambda s, x, limits, e: [select_eidetic(s, x, limits, 0, e)]
        )


# --- checking and timing ----------------------------------------------------------------------------------------------


def check(case: Case) -> Check:
    """The kernel against the plain op. A kernel that cannot be compiled or run is a problem like a wrong number."""
    name = str(case.dtype).removeprefix("mlx.core.")
    with use_kernels(False), mx.stream(mx.cpu):
        want = [np.array(x) for x in case.call(*case.arguments(Inputs(case.dtype, wide=True)))]
    try:
        with use_kernels(True):
            outputs = list(case.call(*case.arguments(Inputs(case.dtype, wide=False))))
            mx.eval(outputs)
    except Exception as error:  # whatever Apple's compiler or driver raises is what the user must see
        return Check(case.op, name, case.sizes, None, f"{type(error).__name__}: {error}")
    errors, problem = [0.0], None
    for i, (output, ref) in enumerate(zip(outputs, want, strict=True)):
        with mx.stream(mx.cpu):
            got = np.array(output.astype(mx.float32) if output.dtype in FLOATS else output)
        if got.shape != ref.shape:
            problem = f"output {i} has shape {got.shape} in place of {ref.shape}"
        elif np.issubdtype(ref.dtype, np.integer):
            wrong = int((got != ref).sum())
            problem = f"output {i}: {wrong} of {ref.size} integers differ" if wrong else problem
        else:
            errors.append(rms_ratio(got, ref))
            if not errors[-1] <= BOUNDS[name]:  # also NaN
                problem = f"output {i} has RMS-error ratio {errors[-1]:.2g}, allowed is {BOUNDS[name]:.0e}"
    return Check(case.op, name, case.sizes, float(np.max(errors)), problem)


def rms_ratio(got: np.ndarray, ref: np.ndarray) -> float:
    """RMS of the difference over RMS of the reference."""
    got, ref = got.astype(np.float64), ref.astype(np.float64)
    return float(np.sqrt(np.sum((got - ref) ** 2) / max(np.sum(ref**2), 1e-30)))


def timing(case: Case) -> Timing:
    """Median time of a call, after one that compiles."""
    arguments = case.arguments(Inputs(case.dtype, wide=False))
    times = []
    for on in (True, False):
        with use_kernels(on):
            mx.eval(list(case.call(*arguments)))
            seconds = []
            for _ in range(REPEATS):
                begin = time.perf_counter()
                mx.eval(list(case.call(*arguments)))
                seconds.append(time.perf_counter() - begin)
        times.append(1e3 * statistics.median(seconds))
    return Timing(case.op, str(case.dtype).removeprefix("mlx.core."), *times)
