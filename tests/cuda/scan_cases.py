"""Cases of the selective scan and of the convolution, and how the kernels are judged: by float64, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmojo_cuda import causal_conv_reference, conv, scan_launch, selective_scan_reference
from bmojo_cuda.documents import forget_marks
from tests.helpers import assert_close

# RMS of the error over RMS of the value. Half precision: one rounding of the result (2^-8 / sqrt 12 and the like), two
# in sums over channels, whose terms the matrix units take in bfloat16 or, for float16, tf32.
BOUNDS = {
    torch.float32: (2e-6, 4e-6),
    torch.float16: (4e-4, 8e-4),
    torch.bfloat16: (3e-3, 5e-3),
}


class ScanCase(NamedTuple):
    """b, l, d, n, dtype and what is given."""

    b: int
    l: int
    d: int
    n: int
    dtype: torch.dtype = torch.float32
    documents: bool = False
    optional: Sequence[str] = ("D", "z", "dt_bias", "state")
    softplus: bool = True

    def inputs(self, device: str, seed: int = 0) -> dict[str, Any]:
        """Arguments of the scan by name; wide steps, from about 1e-3 to 2."""
        rng = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, device=device)

        b, l, d, n = self[:4]
        dt = 2 * normal(b, l, d) - 2
        wide = {
            "x": normal(b, l, d),
            "dt": dt if self.softplus else torch.nn.functional.softplus(dt),
            "B": normal(b, l, n),
            "C": normal(b, l, n),
            "z": normal(b, l, d),
        }
        given: dict[str, Any] = {name: t.to(self.dtype) for name, t in wide.items()}
        given |= {"A": -torch.exp(normal(d, n)), "D": normal(d), "dt_bias": normal(d) / 10, "state": normal(b, d, n)}
        for name in {"D", "z", "dt_bias", "state"}.difference(self.optional):
            given[name] = None
        order = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")
        return {name: given[name] for name in order}

    def segment_ids(self, device: str) -> Tensor | None:
        """Documents of one token and more, the first row padded at its end, the last not split."""
        return documents(self.b, self.l, device) if self.documents else None


def each(given: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """`given` with every tensor changed; what is None stays None."""
    return {name: None if t is None else change(t) for name, t in given.items()}


def documents(b: int, l: int, device: str) -> Tensor:
    """Ids (b, l): rows of several documents, padding at the right of the first row."""
    ids = torch.zeros(b, l, dtype=torch.int64, device=device)
    ids[:, l // 4 :] = 1
    ids[:, l // 4 + 1 :] = 5
    ids[:, l // 2 :] = 2
    ids[0, l - l // 5 :] = -1
    return ids


def assert_scan_equals_float64(case: ScanCase, device: str, **launch: Any) -> None:
    """Outputs and every gradient of the kernels, in NaN-filled memory, twice; `launch`: walk, spans and plans."""
    given, ids = case.inputs(device), case.segment_ids(device)
    exact = each(given, lambda t: t.double().requires_grad_())
    y, last = selective_scan_reference(**exact, segment_ids=ids, dt_softplus=case.softplus)
    dy = torch.randn_like(y).to(case.dtype)
    dlast = torch.randn_like(last).float()
    present = [name for name, t in given.items() if t is not None]
    ref = torch.autograd.grad((y, last), [exact[name] for name in present], (dy.double(), dlast.double()))
    marks = None if ids is None else forget_marks(ids)
    forward = {key: value for key, value in launch.items() if key in ("walk", "spans")}
    backward = {key: value for key, value in launch.items() if key not in forward}

    def run() -> tuple[Tensor, Tensor, scan_launch.Gradients]:
        *inputs, first = given.values()
        rest: list[Any] = [marks, case.softplus, True]
        out, state, saved = scan_launch.forward(*[*inputs, first, *rest], **forward)
        rest[-1] = first is not None
        grads = scan_launch.backward(*[dy, dlast, saved, *inputs, *rest], **backward)
        return out, state, grads

    with nan_filled():
        out, state, grads = run()
    own, summed = BOUNDS[case.dtype]
    assert_close(out, y, own, "y")
    assert_close(state, last, BOUNDS[torch.float32][0], "last state")
    for name, reference in zip(present, ref, strict=True):
        grad = getattr(grads, name)
        assert grad.dtype == (torch.float32 if name == "state" else given[name].dtype), name
        bound = summed if name in ("B", "C") else own if given[name].dtype == case.dtype else 2e-5
        assert_close(grad, reference, bound, f"gradient of {name}")
    if device == "cpu":  # the interpreter has no races
        return
    again, state_again, grads_again = run()
    assert torch.equal(out, again)
    assert torch.equal(state, state_again)
    for name in present:
        assert torch.equal(getattr(grads, name), getattr(grads_again, name)), f"gradient of {name} does not repeat"


class ConvCase(NamedTuple):
    """b, l, d, taps, dtype and what is given."""

    b: int
    l: int
    d: int
    taps: int
    dtype: torch.dtype = torch.float32
    documents: bool = False
    bias: bool = True
    state: bool = True

    def inputs(self, device: str, seed: int = 0) -> dict[str, Any]:
        """Arguments of the convolution by name."""
        rng = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, device=device).to(self.dtype)

        b, l, d, taps = self[:4]
        given = {"x": normal(b, l, d), "weight": normal(d, taps), "bias": normal(d), "state": normal(b, taps - 1, d)}
        return {name: t if getattr(self, name, True) else None for name, t in given.items()}


def assert_conv_equals_float64(case: ConvCase, device: str) -> None:
    """Outputs, last inputs and every gradient of the kernels through autograd, in NaN-filled memory, twice."""
    given = case.inputs(device)
    ids = documents(case.b, case.l, device) if case.documents else None
    exact = each(given, lambda t: t.double().requires_grad_())
    y, last = causal_conv_reference(**exact, segment_ids=ids)
    dy, dlast = torch.randn_like(y).to(case.dtype), torch.randn_like(last).to(case.dtype)
    present = [name for name, t in given.items() if t is not None and t.numel()]
    ref = torch.autograd.grad((y, last), [exact[name] for name in present], (dy.double(), dlast.double()))

    def run() -> list[Tensor]:
        leaves = each(given, lambda t: t.clone().requires_grad_())
        out, state = conv.kernels(**leaves, segment_ids=ids)
        return [out, state, *torch.autograd.grad((out, state), [leaves[name] for name in present], (dy, dlast))]

    with nan_filled():
        found = run()
    for name, got, reference in zip(["y", "last inputs", *present], found, [y, last, *ref], strict=True):
        assert got.dtype == case.dtype, name
        assert_close(got, reference, BOUNDS[case.dtype][0], name)
    for got, again in zip(found, run() if device != "cpu" else found, strict=True):
        assert torch.equal(got, again)


class nan_filled:
    """Inside, memory that torch hands out uninitialised holds NaN."""

    def __enter__(self) -> None:
        memory: Any = torch.utils.deterministic
        self.before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            memory.fill_uninitialized_memory,
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True

    def __exit__(self, *_: object) -> None:
        memory: Any = torch.utils.deterministic
        deterministic, warn_only, fill = self.before
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
