"""The PyTorch twin on an NVIDIA GPU, against the oracle. Run with `pytest -m cuda`."""

from __future__ import annotations

import numpy as np
import pytest

from bmojo_edge import reference
from bmojo_edge.config import Config
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


KERNELS = {  # head_dim and chunk that the kernels take
    "rotated, sinks": {"rope_theta": 1e4, "n_sinks": 3},
    "untied, qk-norm": {"tie_kv": False, "qk_norm": True, "n_fading": 32, "rope_theta": 1e4},
    "hybrid": {"layer_types": ("mamba", "attention"), "n_eidetic": 0, "rope_theta": 1e4},
}


@pytest.mark.filterwarnings(  # PyTorch's own, about itself
    "ignore:.*script_method",
    "ignore:Attempting to run cuBLAS",
    "ignore:The .grad attribute",
    "ignore:Synchronization debug mode",
    "ignore:.*should not be instantiated",
    "ignore:TensorFloat32 tensor cores",
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KERNELS)
def test_training_on_kernels_equals_plain_ops_in_float64(name: str, dtype: str, compiled: bool) -> None:
    """Packed documents through every kernel, eager and one graph a layer, and nothing that waits for the GPU."""
    torch.compiler.reset()  # else the layers of earlier cases count towards its limit of recompilations
    config = Config.preset("tiny", **{"vocab_size": 64, "window": 64, "chunk": 32, "n_eidetic": 16, **KERNELS[name]})
    weights = rounded(random_weights(config), dtype)
    model = load_weights(Model(config.replace(dtype=dtype)), weights).cuda()
    exact = load_weights(Model(config).double(), {n: w.astype(np.float64) for n, w in weights.items()})
    tokens = torch.randint(0, 64, (2, 300))
    labels = torch.tensor([[0] * 128 + [1] * 152 + [-1] * 20, [2] * 96 + [3] * 204])
    for block in model.blocks() if compiled else ():
        block.compile(fullgraph=True)
    on_gpu = tokens.cuda()
    model.activations(on_gpu, labels).float().sum().backward()  # compiles what waits
    model.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = model.activations(on_gpu, labels)
        (out.float() * torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        forced = model.forward_with_memory(on_gpu, segment_ids=labels)[2].eidetic_index.cpu()
    ref = exact.hidden(tokens, segment_ids=labels, eidetic_index=forced if config.n_eidetic else None)[0]
    (ref * torch.linspace(-1, 1, ref.numel()).double().view_as(ref)).sum().backward()
    u = ROUNDOFF[dtype]
    assert_close(out, ref, 12 * u)
    for (n, got), p in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert_close(got.grad, p.grad, 100 * u, n)


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
