"""Fused linear and cross-entropy against PyTorch's cross-entropy of all logits in float64."""

from __future__ import annotations

import pytest

from tests.helpers import assert_close

torch = pytest.importorskip("torch")

from bmojo_edge.torch import loss  # noqa: E402
from bmojo_edge.torch.loss import linear_cross_entropy  # noqa: E402

IGNORED = -100


def problem(n: int, d: int, v: int, dtype, device: str = "cpu"):
    """Activations, a head and targets of which some do not count; logits far from 0."""
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, d, generator=generator).to(device, dtype)
    weight = (torch.randn(v, d, generator=generator) * 3 * d**-0.5).to(device, dtype)
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[::5] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets.to(device)


def reference(hidden, weight, targets, scale: float):
    """Loss and gradients in float64."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    total = torch.nn.functional.cross_entropy(h @ w.t(), targets, ignore_index=IGNORED, reduction="sum") * scale
    return total, *torch.autograd.grad(total, (h, w))


def check(dtype, device: str, n: int, d: int, v: int) -> None:
    hidden, weight, targets = problem(n, d, v, dtype, device)
    runs = []
    for _ in range(2):
        total = linear_cross_entropy(hidden, weight, targets, IGNORED) * 0.37
        runs.append((total, *torch.autograd.grad(total, (hidden, weight))))
    ref = reference(hidden, weight, targets, 0.37)
    assert runs[0][0].dtype == torch.float32
    assert_close(runs[0][0], ref[0], 1e-5, "loss")
    u = torch.finfo(dtype).eps
    for got, again, exact in zip(runs[0][1:], runs[1][1:], ref[1:], strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, again)
        assert_close(got, exact, max(2 * u, 1e-5))


@pytest.mark.parametrize("chunk", [1, 100, 10**6])  # one token at a time, some, all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_cross_entropy_of_all_logits(dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk)
    check(dtype, "cpu", 37, 16, 31)


@pytest.mark.cuda
@pytest.mark.filterwarnings(  # PyTorch's own, about itself
    "ignore:.*script_method", "ignore:Attempting to run cuBLAS", "ignore:The .grad attribute"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_cross_entropy_on_a_gpu(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 2**22)
    check(dtype, "cuda", 1000, 256, 8191)


def test_gradients_by_differences() -> None:
    hidden, weight, targets = problem(9, 4, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets) * 0.5, (hidden, weight))


def test_what_needs_no_gradient_gets_none() -> None:
    hidden, weight, targets = problem(9, 4, 7, torch.float32)
    for h, w in ((hidden, weight.detach()), (hidden.detach(), weight)):
        linear_cross_entropy(h.view(3, 3, 4), w, targets.view(3, 3)).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    for got, exact in zip((hidden.grad, weight.grad), reference(hidden, weight, targets, 1.0)[1:], strict=True):
        assert_close(got, exact, 1e-5)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_nothing_to_predict_is_no_loss() -> None:
    hidden, weight, targets = problem(4, 3, 5, torch.float32)
    total = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED))
    total.backward()
    assert total.item() == 0
    assert not hidden.grad.any()


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="hidden, weight, targets"):
        linear_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64))
