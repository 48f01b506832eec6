"""The loss that is trained on: packing, carried states, recomputation and precision change none of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bmojo_edge.state import leaves
from bmojo_edge.torch.carried import fresh_rows
from bmojo_edge.torch.data import NO_TARGET
from bmojo_edge.torch.load import load_weights
from bmojo_edge.torch.model import Model
from bmojo_edge.torch.trainee import Trainee, float32_names, prepare
from tests.helpers import GRID, odd, random_tokens, random_weights, rms_ratio

CONFIGS = {"bmojo": odd(), "mixed": GRID["mixed"], "full attention": odd("attention", "bmojo"), "mamba": GRID["mamba"]}


def trainee(config: Any, cast: torch.dtype | None = None, recompute: bool = False) -> Trainee:
    model = load_weights(Model(config.replace(dtype="float32")), random_weights(config))
    model.config = config
    prepare(model, cast, recompute, compiled=False)
    return Trainee(model, cast)


def shifted(tokens: Tensor) -> Tensor:
    """Every token's next one; the last has none."""
    return F.pad(tokens[:, 1:], (0, 1), value=NO_TARGET)


@pytest.mark.parametrize("name", CONFIGS)
def test_carried_states_equal_one_long_sequence(name: str) -> None:
    config = CONFIGS[name]
    tokens = torch.from_numpy(random_tokens(config, 2, 72))
    targets, parts = shifted(tokens), trainee(config)
    whole, _ = parts(tokens, targets, None, None, None)
    state, total = fresh_rows(config, 2, torch.device("cpu")), torch.zeros(())
    for begin in range(0, 72, 24):
        here = slice(begin, begin + 24)
        loss, state = parts(tokens[:, here], targets[:, here], None, state, None)
        total = total + loss
        assert state is not None and all(not leaf.requires_grad for _, leaf in leaves(state))
    torch.testing.assert_close(total, whole, rtol=2e-6, atol=0)
    total.backward()


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_documents_alone(name: str) -> None:
    config = CONFIGS[name]
    tokens = torch.from_numpy(random_tokens(config, 1, 60))
    segments, targets = torch.full((1, 60), -1), torch.full((1, 60), NO_TARGET)
    alone = torch.zeros(())
    for segment, (low, high) in enumerate(((0, 22), (24, 50), (51, 60))):
        document = tokens[:, low:high]
        segments[:, low:high], targets[:, low:high] = segment, shifted(document)
        alone = alone + trainee(config)(document, shifted(document), None, None, None)[0]
    packed, _ = trainee(config)(tokens, targets, segments, None, None)
    torch.testing.assert_close(packed, alone, rtol=2e-6, atol=0)


def test_rows_that_restart_forget() -> None:
    config = CONFIGS["mixed"]
    tokens = torch.from_numpy(random_tokens(config, 2, 48))
    first, second, parts = tokens[:, :24], tokens[:, 24:], trainee(config)
    _, state = parts(first, shifted(first), None, fresh_rows(config, 2, torch.device("cpu")), None)
    got, _ = parts(second, shifted(second), None, state, torch.tensor([False, True]))
    kept, _ = parts(second, shifted(second), None, state, None)
    row = second[1:]
    _, state_0 = parts(first[:1], shifted(first[:1]), None, fresh_rows(config, 1, torch.device("cpu")), None)
    want = (
        parts(second[:1], shifted(second[:1]), None, state_0, None)[0] + parts(row, shifted(row), None, None, None)[0]
    )
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)
    assert (kept - want).detach().abs() > 1e-3


def gradients(module: Trainee, tokens: Tensor, state: Any = None) -> dict[str, Tensor]:
    loss, _ = module(tokens, shifted(tokens), None, state, None)
    loss.backward()
    return {name: p.grad for name, p in module.loss.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_recomputation_changes_no_bit(cast: torch.dtype | None) -> None:
    config = CONFIGS["mixed"].replace(dtype="float32" if cast is None else "bfloat16")
    tokens = torch.from_numpy(random_tokens(config, 2, 30))
    kept, again = (gradients(trainee(config, cast, recompute), tokens) for recompute in (False, True))
    assert kept.keys() == again.keys() == dict(Model(config).named_parameters()).keys()
    for name, grad in kept.items():
        torch.testing.assert_close(again[name], grad, rtol=0, atol=0, msg=name)


def test_bfloat16_computes_as_a_bfloat16_model_and_keeps_float32_parameters() -> None:
    config = CONFIGS["bmojo"].replace(dtype="bfloat16")
    tokens = torch.from_numpy(random_tokens(config, 2, 30))
    module, half = trainee(config, torch.bfloat16), load_weights(Model(config), random_weights(config))
    loss, state = module(tokens, shifted(tokens), None, fresh_rows(config, 2, torch.device("cpu")), None)
    logits, want_state = half(tokens)
    want = F.cross_entropy(logits.flatten(0, 1).float(), shifted(tokens).flatten(), reduction="sum")
    torch.testing.assert_close(loss, want, rtol=1e-3, atol=0)  # whose logits are rounded
    assert [leaf.dtype for _, leaf in leaves(state)] == [leaf.dtype for _, leaf in leaves(want_state)]
    loss.backward()
    for name, p in module.loss.model.named_parameters():
        assert p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32, name
    exact = gradients(trainee(CONFIGS["bmojo"]), tokens)
    name = "layers.0.mixer.ssm.in_proj.weight"
    assert rms_ratio(module.loss.model.get_parameter(name).grad, exact[name]) < 0.2


def test_what_the_scan_is_made_of_stays_float32() -> None:
    names = float32_names(odd("bmojo", "mamba", dtype="bfloat16"))
    assert names == {
        f"layers.{layer}.{name}" for layer in ("0.mixer.ssm", "1.mixer") for name in ("A_log", "D", "dt_proj.bias")
    }


@pytest.mark.slow
def test_compiled_layers_compute_the_same() -> None:
    config = CONFIGS["mixed"]
    tokens = torch.from_numpy(random_tokens(config, 2, 30))
    model = load_weights(Model(config), random_weights(config))
    prepare(model, None, recompute=False, compiled=True)
    got, want = gradients(Trainee(model), tokens), gradients(trainee(config), tokens)
    for name, grad in want.items():
        assert rms_ratio(got[name], grad) < 1e-4, name
