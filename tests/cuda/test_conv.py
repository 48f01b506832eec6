"""The causal convolution: its plain op against the oracle, its kernels interpreted, compiled, and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from bmojo_edge import reference_ssm
from tests.cuda.processes import compiled, need_triton, run_interpreted
from tests.helpers import assert_close

torch = pytest.importorskip("torch")

from bmojo_cuda import causal_conv, causal_conv_reference  # noqa: E402
from tests.cuda.scan_cases import ConvCase, assert_conv_equals_float64, documents, each  # noqa: E402

# --- anywhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("l", "taps"), [(1, 4), (2, 4), (9, 2), (9, 1)])
def test_plain_op_equals_the_oracle(l: int, taps: int) -> None:
    rng = np.random.default_rng(0)
    x, past, weight, bias = (rng.standard_normal(shape) for shape in ((l, 3), (taps - 1, 3), (3, taps), (3,)))
    ref, ref_last = reference_ssm.causal_conv(x, past, weight, bias)
    y, last = causal_conv_reference(*(torch.from_numpy(t) for t in (x[None], weight, bias, past[None])))
    assert_close(y[0], reference_ssm.silu(ref), 1e-14)
    assert_close(last[0], ref_last, 1e-14)


def test_packed_documents_equal_documents_alone() -> None:
    given = each(ConvCase(1, 12, 3, 4).inputs("cpu"), torch.Tensor.double)
    ids = torch.tensor([[0] * 5 + [1] * 2 + [2] * 3 + [-1] * 2])
    y, last = causal_conv_reference(**given, segment_ids=ids)
    for begin, end in ((0, 5), (5, 7), (7, 10)):
        state = given["state"] if begin == 0 else None
        alone, alone_last = causal_conv_reference(given["x"][:, begin:end], given["weight"], given["bias"], state)
        assert_close(y[:, begin:end], alone, 1e-14)
    assert_close(last, alone_last, 1e-14)
    assert not y[:, 10:].any()


@pytest.mark.parametrize(
    ("name", "shape"), [("weight", (4, 3)), ("weight", (3, 0)), ("bias", (4,)), ("state", (1, 3, 3))]
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    given = ConvCase(1, 5, 3, 3).inputs("cpu")
    with pytest.raises(ValueError, match=f"^{name}: must have shape"):
        causal_conv(**{**given, name: torch.zeros(shape)})


def test_kernels_interpreted() -> None:
    run_interpreted("scan_interpreted.py", "test_conv or padding")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_without_spills(arch: int) -> None:
    need_triton("compilation of Triton's kernels")
    from bmojo_cuda import conv_kernels as kernels

    types = {
        **dict.fromkeys(("X", "Y", "DY", "DX", "PAST"), "*bf16"),
        **dict.fromkeys(("W", "BIAS", "DPAST", "DW", "DBIAS"), "*fp32"),
        **dict.fromkeys(("L", "D", "x_b", "x_t"), "i32"),
        "MARKS": "*i64",
    }
    constants = {"TAPS": 4, "SPAN": 64, "U": 8, "BD": 64, "HAS_BIAS": True, "HAS_PAST": True, "RESETS": False}
    for kernel in (kernels.conv_forward, kernels.conv_backward):
        code = compiled(kernel, types, constants, arch)
        assert code.spilled == 0, (kernel.fn.__name__, code[:2])


# --- on a GPU -------------------------------------------------------------------------------------------------------

CASES = {
    "bf16": ConvCase(2, 333, 96, 4, torch.bfloat16),
    "fp16, documents": ConvCase(2, 130, 70, 3, torch.float16, documents=True, state=False),
    "fp32, documents and state": ConvCase(2, 129, 35, 4, documents=True),
    "one token": ConvCase(2, 1, 64, 4, torch.bfloat16),
    "eight taps, no bias": ConvCase(1, 66, 65, 8, bias=False),
    "one tap": ConvCase(1, 66, 65, 1),
    "large, odd": ConvCase(2, 2049, 1030, 4, torch.bfloat16),
}


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str) -> None:
    torch.manual_seed(0)
    assert_conv_equals_float64(CASES[name], "cuda")


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, when its compiler is imported
def test_public_op_compiles() -> None:
    given = each(ConvCase(2, 96, 64, 4, torch.bfloat16).inputs("cuda"), torch.Tensor.requires_grad_)

    def run(op) -> list:
        y, last = op(**given, segment_ids=documents(2, 96, "cuda"))
        return [y, last, *torch.autograd.grad(y.float().square().sum() + last.sum(), list(given.values()))]

    for got, ref in zip(run(torch.compile(causal_conv, fullgraph=True)), run(causal_conv), strict=True):
        assert_close(got, ref, 1e-6)


@pytest.mark.cuda
def test_tensors_of_more_than_2_to_the_31_elements() -> None:
    d, taps = 2048, 4
    l, end = (1 << 31) // d + 131, 200
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    torch.manual_seed(0)
    x = torch.randn(1, l, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(d, taps, device="cuda")
    y, last = causal_conv(x, weight)
    dy = torch.randn(1, end, d, device="cuda", dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(y[:, -end:], x, dy)
    tail = x.detach()[:, -2 * end :].double().requires_grad_()
    ref, ref_last = causal_conv_reference(tail, weight.double())
    (exact,) = torch.autograd.grad(ref[:, -end:], tail, dy.double())
    assert_close(y[:, -end:], ref[:, -end:], 3e-3)
    assert_close(grad[:, -end:], exact[:, -end:], 3e-3)
    assert torch.equal(last.double(), ref_last)
