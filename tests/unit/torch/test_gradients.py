"""Gradients of the PyTorch twin against finite differences in float64: through every memory, into a carried state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bmojo_edge.config import Config
from bmojo_edge.state import leaves
from tests.helpers import GRID, assert_close, odd, random_tokens, random_weights

torch = pytest.importorskip("torch")

from bmojo_edge.torch import Model, load_weights  # noqa: E402
from bmojo_edge.torch.ops import selective_scan  # noqa: E402

SIZES: dict[str, Any] = {"vocab_size": 11, "d_model": 8, "d_ff": 6, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4}
TINY = {
    "bmojo": odd("bmojo", "bmojo", **SIZES, window=4, n_fading=3, n_eidetic=3, n_sinks=1, chunk=2),
    "untied": odd("bmojo", **SIZES, window=4, n_eidetic=3, chunk=3, tie_kv=False, qk_norm=True, attention_bias=True),
    "no ssm": odd("bmojo", **SIZES, window=4, n_eidetic=3, chunk=4, ssm=None),
    "hybrid": odd("mamba", "attention", "attention", **SIZES, attention_window=(None, 3, None)),
    "experts": odd("mamba", **SIZES, experts={"n": 3, "per_token": 2, "layers": [0]}),
}


def double(config: Config) -> Model:
    model = Model(config).double()
    return load_weights(model, {name: w.astype(np.float64) for name, w in random_weights(config).items()})


@pytest.mark.parametrize("name", TINY)
def test_parameters(name: str) -> None:
    """Logits of 14 ragged tokens after 5 carried ones, and the floats of the state, in every parameter at once."""
    config = TINY[name]
    model, tokens = double(config), random_tokens(config, 2, 19)
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in model.named_parameters()), strict=True)

    def run(*parameters):
        def call(*arguments, **options):
            return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), arguments, options)

        first, state = call(tokens[:, :5])
        logits, state = call(tokens[:, 5:], state, lengths=[14, 9])
        kept = [leaf for n, leaf in leaves(state) if leaf.requires_grad]
        return torch.cat([x.flatten() for x in (first, logits, *kept)])

    assert torch.autograd.gradcheck(run, values, fast_mode=True, atol=1e-6, rtol=1e-5)
    run(*values).square().sum().backward()
    reached = {n: p.grad is not None and bool(p.grad.abs().max() > 0) for n, p in zip(names, values, strict=True)}
    assert all(reached.values()), [n for n, there in reached.items() if not there]


@pytest.mark.parametrize("name", TINY)
def test_packed_documents(name: str) -> None:
    config = TINY[name]
    model, tokens = double(config), random_tokens(config, 1, 20)
    segments = np.array([[0] * 8 + [1] * 9 + [-1] * 3])
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in model.named_parameters()), strict=True)

    def run(*parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, named, (tokens,), {"segment_ids": segments})[0]

    assert torch.autograd.gradcheck(run, values, fast_mode=True, atol=1e-6, rtol=1e-5)
    alone = [
        torch.autograd.grad(
            torch.func.functional_call(model, dict(zip(names, values, strict=True)), (part,))[0].square().sum(), values
        )
        for part in (tokens[:, :8], tokens[:, 8:17])
    ]
    packed = torch.autograd.grad(run(*values).square().sum(), values)
    for got, *parts in zip(packed, *alone, strict=True):
        assert_close(got, sum(parts), 1e-10)


@pytest.mark.parametrize("name", TINY)
def test_carried_state(name: str) -> None:
    """Every float leaf that attention or a scan reads gets its gradient; innovations have none to give."""
    config = TINY[name]
    model, tokens = double(config), random_tokens(config, 2, 30)
    with torch.no_grad():
        _, state = model(tokens[:, :19], lengths=[19, 13])
    named = [(n, leaf) for n, leaf in leaves(state) if leaf.is_floating_point()]
    read = [n for n, _ in named if not n.endswith(("scores", "history"))]
    values = [leaf.clone().requires_grad_() for n, leaf in named if n in read]

    def run(*given):
        from bmojo_edge.state import map_leaves

        replaced = {id(leaf): new for (_, leaf), new in zip([x for x in named if x[0] in read], given, strict=True)}
        carried = map_leaves(lambda leaf: replaced.get(id(leaf), leaf), state)
        return model(tokens[:, 19:], carried, lengths=[11, 8])[0]

    assert torch.autograd.gradcheck(run, values, fast_mode=True, atol=1e-6, rtol=1e-5)
    grads = torch.autograd.grad(run(*values).square().sum(), values)
    for n, grad in zip(read, grads, strict=True):
        assert grad.abs().max() > 0, n


@pytest.mark.parametrize("name", ["bmojo", "hybrid", "no ssm"])
def test_a_split_that_is_not_detached_has_the_gradient_of_the_whole(name: str) -> None:
    config = TINY[name]
    model, tokens = double(config), random_tokens(config, 2, 30)
    grads = []
    for cuts in ([30], [7, 23], [13, 17]):
        state, total, begin = None, torch.zeros((), dtype=torch.float64), 0
        for n in cuts:
            logits, state = model(tokens[:, begin : begin + n], state)
            total, begin = total + logits.logsumexp(-1).sum(), begin + n
        grads.append(torch.autograd.grad(total, list(model.parameters())))
    for whole, *parts in zip(*grads, strict=True):
        for part in parts:
            assert_close(part, whole, 1e-10)


def test_detached_state_stops_the_gradient() -> None:
    from bmojo_edge.state import map_leaves

    config = TINY["bmojo"]
    model, tokens = double(config), random_tokens(config, 1, 24)
    _, state = model(tokens[:, :12])
    assert state.layers[0].ssm.ssm.requires_grad
    assert not state.layers[0].history.requires_grad
    detached = map_leaves(lambda leaf: leaf.detach(), state)
    first = model.get_parameter("layers.0.norm.weight")
    alone = torch.autograd.grad(model(tokens[:, 12:], detached)[0].sum(), first)[0]
    through = torch.autograd.grad(model(tokens[:, 12:], state)[0].sum(), first)[0]
    assert (alone - through).abs().max() > 1e-6


def test_selective_scan_in_all_its_inputs() -> None:
    torch.manual_seed(0)
    b, t, d, n = 2, 37, 3, 2  # more than one chunk of the scan

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    reset = torch.zeros(b, t, dtype=torch.bool)
    reset[0, [9, 33]] = True
    inputs = (draw(b, t, d), draw(b, t, d), draw(d, n), draw(b, t, n), draw(b, t, n), draw(d), draw(b, d, n))

    def run(x, dt, A, *rest):
        steps = torch.nn.functional.softplus(dt) * (torch.arange(t) % 7 > 0)[:, None]
        return selective_scan(x, steps, -A.exp(), *rest, reset=reset)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-6)


def test_gradients_of_float32_are_near_those_of_float64() -> None:
    for name in ("all", "mixed", "untied, qk-norm, bias"):
        config = GRID[name]
        weights, tokens = random_weights(config), random_tokens(config, 2, 40)
        grads = []
        for model in (load_weights(Model(config), weights), double(config)):
            torch.nn.functional.cross_entropy(
                model(tokens[:, :-1])[0].flatten(0, 1), torch.from_numpy(tokens[:, 1:]).flatten()
            ).backward()
            grads.append([p.grad for p in model.parameters()])
        for got, ref in zip(*grads, strict=True):
            assert_close(got, ref, 1e-5, name)


def test_padding_gets_no_gradient_and_gives_none() -> None:
    config = GRID["all"]
    model = load_weights(Model(config), random_weights(config))
    tokens = random_tokens(config, 2, 20) % (config.vocab_size - 1)
    tokens[1, 9:] = config.vocab_size - 1
    with torch.no_grad():
        model.embed.weight[-1] = float("nan")
    model(tokens, lengths=[20, 9])[0].square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.isfinite(p.grad).all(), name
    assert model.embed.weight.grad is not None
    assert not model.embed.weight.grad[-1].any()
