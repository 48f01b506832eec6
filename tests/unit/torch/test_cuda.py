"""The PyTorch twin on an NVIDIA GPU, against the oracle. Run with `pytest -m cuda`."""

from __future__ import annotations

import numpy as np
import pytest

from bmojo_edge import reference
from tests.helpers import GRID, assert_close, assert_states_close, random_tokens, random_weights, rounded, to_numpy

torch = pytest.importorskip("torch")

from bmojo_edge.torch import Model, load_weights  # noqa: E402
from bmojo_edge.torch.ops import linear_wide  # noqa: E402

pytestmark = pytest.mark.cuda

NAMES = ["all", "mixed", "no ssm", "untied, qk-norm, bias", "chunk of one", "experts", "mamba"]
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@torch.no_grad()
@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize(
    "name", ["all", "mixed", "no ssm", "untied, qk-norm, bias", "chunk of one", "experts", "mamba"]
)
def test_equals_the_oracle(name: str, dtype: str) -> None:
    config, u = GRID[name], ROUNDOFF[dtype]
    weights, tokens = rounded(random_weights(config), dtype), random_tokens(config, 2, 60)
    model = load_weights(Model(config.replace(dtype=dtype)), weights).cuda()
    segments = np.array([[0] * 20 + [1] * 37 + [-1] * 3, [4] * 60])
    for labels in (None, segments):
        logits, state, memory = model.forward_with_memory(tokens, segment_ids=labels)
        sets = to_numpy(memory.eidetic_index)
        ref, ref_state = reference.forward(config, weights, tokens, segment_ids=labels, eidetic_index=sets)
        assert_close(logits, ref, 12 * u, "logits")
        assert_states_close(state, ref_state, 48 * u)
    for step in range(4):
        token = random_tokens(config, 2, 1, seed=step)
        ref, ref_state = reference.forward(config, weights, token, ref_state)
        logits, state = model.decode_one_token(token[:, 0], state)
        if dtype == "float32":
            assert_close(logits, ref[:, 0], 24 * u, f"token {step}")
            assert_states_close(state, ref_state, 48 * u)
        assert torch.isfinite(logits).all()


def test_gradients_equal_those_of_the_cpu_in_float64() -> None:
    for name in ("all", "mixed", "untied, qk-norm, bias"):
        config = GRID[name]
        weights, tokens = random_weights(config), random_tokens(config, 2, 40)
        exact = load_weights(Model(config).double(), {n: w.astype(np.float64) for n, w in weights.items()})
        model = load_weights(Model(config), weights).cuda()
        for m in (exact, model):
            m(tokens)[0].logsumexp(-1).square().sum().backward()
        for (n, got), ref in zip(model.named_parameters(), exact.parameters(), strict=True):
            assert_close(got.grad, ref.grad, 2e-5, f"{name}: {n}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision_products_are_not_rounded(dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 50, 96, device="cuda", dtype=dtype, requires_grad=True)
    w = (torch.randn(80, 96, device="cuda", dtype=dtype) / 10).requires_grad_()
    y = linear_wide(x, w)
    assert y.dtype == torch.float32
    assert_close(y, x.detach().double() @ w.detach().double().T, 1e-6)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad is not None
    assert w.grad is not None
    u = torch.finfo(dtype).eps
    assert_close(x.grad, grad.double() @ w.detach().double(), 2 * u)
    assert_close(w.grad, grad.double().flatten(0, 1).T @ x.detach().double().flatten(0, 1), 2 * u)
