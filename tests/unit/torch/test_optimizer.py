"""Which parameters learn how fast and decay, the learning rate of a step, the norm of the gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from bmojo_edge.torch.model import Model
from bmojo_edge.torch.optimizer import adamw, clip_gradients, decays, is_ssm, learning_rate, set_learning_rate
from bmojo_edge.train_config import Optimizer
from tests.helpers import odd

NAMES = {
    "layers.0.mixer.ssm.in_proj.weight": (True, True),
    "layers.0.mixer.ssm.A_log": (True, False),
    "layers.0.mixer.ssm.D": (True, False),
    "layers.0.mixer.ssm.dt_proj.weight": (True, True),
    "layers.0.mixer.ssm.dt_proj.bias": (True, False),
    "layers.0.mixer.ssm.conv.bias": (True, False),
    "layers.0.mixer.q_proj.weight": (False, True),
    "layers.0.mixer.q_proj.bias": (False, False),
    "layers.0.mixer.q_norm.weight": (False, False),
    "layers.0.mixer.fading.k_proj.weight": (False, True),
    "layers.0.mlp.gate_proj.weight": (False, True),
    "layers.0.mlp_norm.weight": (False, False),
    "layers.1.mixer.o_proj.weight": (False, True),
    "layers.2.mixer.out_proj.weight": (True, True),
    "layers.2.mixer.A_log": (True, False),
    "layers.2.norm.weight": (False, False),
    "embed.weight": (False, True),
    "lm_head.weight": (False, True),
    "norm.weight": (False, False),
}


def test_groups_by_name() -> None:
    config = odd("bmojo", "attention", "mamba", tie_kv=False, qk_norm=True, attention_bias=True)
    model = Model(config)
    assert NAMES.keys() <= dict(model.named_parameters()).keys()
    assert {name: (is_ssm(name, config), decays(name)) for name in NAMES} == NAMES
    optimizer = adamw(model, config, Optimizer(lr=1e-3, final_lr=0.0, weight_decay=0.3, ssm_lr_scale=5))
    found = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    set_learning_rate(optimizer, Optimizer(lr=1e-3, final_lr=0.0, warmup=0, ssm_lr_scale=5), 0, 10)
    for name, (ssm, decaying) in NAMES.items():
        group = found[model.get_parameter(name)]
        assert group["lr"] == pytest.approx(5e-3 if ssm else 1e-3)
        assert group["weight_decay"] == (0.3 if decaying else 0.0)


def test_other_mixers_are_state_spaces_too() -> None:
    config = odd("mamba2", "gdn", d_model=24, head_dim=6, ssm={"kind": "mamba2"})
    assert is_ssm("layers.0.mixer.dt_bias", config) and not decays("layers.0.mixer.dt_bias")
    assert is_ssm("layers.1.mixer.q_proj.weight", config)


def test_learning_rate() -> None:
    settings = Optimizer(lr=1.0, final_lr=0.1, warmup=0.1)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0 and rates[99] == pytest.approx(0.1)
    assert rates[10 + 44] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 44 / 89)) / 2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(settings, 99, 100, scale=5) == pytest.approx(0.1)
    assert learning_rate(settings, 9, 100, scale=5) == 5.0
    assert learning_rate(Optimizer(lr=1.0, warmup=0), 0, 1) == 1.0


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping(limit: float) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 5)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    grads = torch.cat([p.grad.clone() for p in parameters if p.grad is not None])
    assert clip_gradients(parameters, limit) == pytest.approx(float(grads.norm()))
    got = torch.cat([p.grad for p in parameters if p.grad is not None])
    torch.testing.assert_close(got, grads * min(1.0, limit / float(grads.norm())), rtol=1e-5, atol=0)
