"""The scan's and the convolution's kernels on Triton's interpreter; test_scan.py and test_conv.py run this file.

In a process of its own: Triton decides when it is imported whether it interprets. Segments and spans are of 16 tokens
here, so that short rows have several.
"""

from __future__ import annotations

from tests.cuda import interpreter  # isort: skip  (first: it patches Triton before kernels are defined)

import pytest
import torch

from bmojo_cuda import conv, scan, scan_launch
from tests.cuda.scan_cases import (
    BOUNDS,
    ConvCase,
    ScanCase,
    assert_conv_equals_float64,
    assert_scan_equals_float64,
    documents,
    each,
)
from tests.helpers import assert_close

assert interpreter


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_launch, "SEGMENT", 16)
    monkeypatch.setattr(scan, "SEGMENT", 16)
    monkeypatch.setattr(conv, "SPAN", 16)
    torch.manual_seed(0)


SCANS = {
    "odd sizes, documents": (ScanCase(1, 19, 3, 5, documents=True), {}),
    "one token, nothing optional": (ScanCase(1, 1, 3, 3, torch.float16, optional=(), softplus=False), {}),
    "spans, documents": (ScanCase(1, 35, 3, 3, torch.bfloat16, documents=True), {"spans": 3}),
    "spans from zero": (ScanCase(1, 17, 2, 8, torch.float16, optional=("z",)), {"spans": 2}),
    "more states than a group": (ScanCase(1, 3, 2, 5), {}),
}


@pytest.mark.parametrize("name", SCANS)
def test_scan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, launch = SCANS[name]
    if name == "more states than a group":
        monkeypatch.setattr(scan_launch, "GROUP", 3)
    assert_scan_equals_float64(case, "cpu", **launch)


@pytest.mark.parametrize("n", [16, 32])
def test_forward_of_many_states(n: int) -> None:
    case = ScanCase(1, 9, 3, n, torch.bfloat16)
    given = case.inputs("cpu")
    y, last, _ = scan_launch.forward(*[*given.values(), None, True, False])
    exact = each(given, torch.Tensor.double)
    ref, ref_last = scan.selective_scan_reference(**exact)
    assert_close(y, ref, BOUNDS[case.dtype][0], "y")
    assert_close(last, ref_last, 1e-6, "last state")


CONVS = {
    "state": ConvCase(1, 19, 5, 4),
    "documents and state": ConvCase(2, 21, 5, 4, torch.bfloat16, documents=True),
    "documents": ConvCase(1, 21, 3, 3, torch.float16, documents=True, state=False),
    "shorter than its taps": ConvCase(1, 2, 3, 8),
    "one token, no bias": ConvCase(1, 1, 70, 2, bias=False, state=False),
    "one tap": ConvCase(1, 5, 3, 1),
}


def test_autograd_outside_of_compile_is_that_of_the_operator() -> None:
    for optional in ((), ("D", "z", "dt_bias", "state")):
        case = ScanCase(1, 3, 2, 2, optional=optional)
        given = each(case.inputs("cpu"), torch.Tensor.requires_grad_)
        y, last, saved = scan._Eager.apply(*given.values(), None, True, True)
        present = [t for t in given.values() if t is not None]
        for out in (y, last):
            found = torch.autograd.grad(out.square().sum(), present, retain_graph=True, allow_unused=True)
            exact = each(given, lambda t: t.detach().double().requires_grad_())
            ref = scan.selective_scan_reference(**exact)[0 if out is y else 1]
            leaves = [t for t in exact.values() if t is not None]
            for got, want in zip(
                found, torch.autograd.grad(ref.square().sum(), leaves, allow_unused=True), strict=True
            ):
                assert_close(got, torch.zeros_like(got) if want is None else want, 2e-6)
        assert not saved.requires_grad


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch):
    """The custom ops on CPU tensors too: the kernels, interpreted."""
    ops = [(conv._conv, conv.forward), (conv._conv_backward, conv.backward)]
    ops += [(scan._scan, scan_launch.forward), (scan._scan_backward, backward_as_list)]
    for op, kernel in ops:
        op.register_kernel("cpu", kernel)


def backward_as_list(*arguments) -> list[torch.Tensor]:
    return [t for t in scan_launch.backward(*arguments) if t is not None]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", CONVS)
def test_conv(name: str) -> None:
    assert_conv_equals_float64(CONVS[name], "cpu")


@pytest.mark.usefixtures("on_cpu")
def test_padding_on_the_left_leaves_the_state_to_the_first_document() -> None:
    case = ConvCase(2, 9, 3, 4)
    given = case.inputs("cpu")
    ids = torch.tensor([[-1, -1, 0, 0, 0, 1, 1, -1, -1], [-1] * 9])
    y, last = conv.kernels(**given, segment_ids=ids)
    exact = each(given, torch.Tensor.double)
    ref, ref_last = conv.causal_conv_reference(**exact, segment_ids=ids)
    assert_close(y, ref, 1e-6)
    assert torch.equal(last.double(), ref_last)


@pytest.mark.usefixtures("on_cpu")
def test_operators_keep_their_contract_with_torch() -> None:
    case = ScanCase(1, 3, 2, 2, documents=True)
    given = each(case.inputs("cpu"), torch.Tensor.requires_grad_)
    marks = scan.forget_marks(documents(1, 3, "cpu"))
    torch.library.opcheck(scan._scan, (*given.values(), marks, True, True))
    few = {**given, "D": None, "z": None, "dt_bias": None, "state": None}
    torch.library.opcheck(scan._scan, (*few.values(), None, True, True), test_utils=("test_schema", "test_faketensor"))
    given = each(ConvCase(1, 3, 2, 3).inputs("cpu"), torch.Tensor.requires_grad_)
    torch.library.opcheck(conv._conv, (*given.values(), None))
