"""A whole small model whose MLX twin runs the Metal text on the harness, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import bmojo_metal.launch  # noqa: E402
import bmojo_metal.scan  # noqa: E402
from bmojo_edge import reference  # noqa: E402
from bmojo_edge.config import Config, Quantization  # noqa: E402
from bmojo_edge.mlx import Model, load_weights  # noqa: E402
from bmojo_edge.quantize import dequantized, is_quantizable, quantize  # noqa: E402
from metal_kernels.host import Run  # noqa: E402
from tests.helpers import GRID, assert_close, assert_states_close, odd, random_tokens, random_weights  # noqa: E402
from tests.metal.case import kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("harness")

BOUND = 5e-6  # RMS-error ratio, float32
# What a bmojo layer around Mamba runs, in a call of many tokens and in decoding.
BODIES = {"conv", "scan", "innovation", "innovation_step", "select", "eidetic_slots"}


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the bodies that ran."""
    ran: set[str] = set()
    launch = bmojo_metal.launch.Kernel.__call__

    def counted(self, *arguments, **options):
        ran.add(self.name)
        return launch(self, *arguments, **options)

    monkeypatch.setattr(bmojo_metal.launch.Kernel, "__call__", counted)
    return ran


def check(config: Config, weights: Mapping[str, np.ndarray], model: Model, bound: float, run: Run) -> None:
    """Ragged rows through forward, then tokens one by one with a row at rest, then forward again."""
    tokens = random_tokens(config, 2, 31)
    want, state_want = reference.forward(config, weights, tokens[:, :19], lengths=[19, 14])
    with kernels(run):
        got, state = model.forward(tokens[:, :19], model.init_state(2), lengths=np.array([19, 14]))
        assert_close(got, want, bound)
        for i in range(19, 28):
            lengths = [1, i % 3 > 0]
            want, state_want = reference.forward(config, weights, tokens[:, i : i + 1], state_want, lengths=lengths)
            got, state = model.decode_one_token(tokens[:, i], state, active=np.array(lengths, bool))
            assert_close(got[:, None], want, bound)
        want, state_want = reference.forward(config, weights, tokens[:, 28:], state_want)
        got, state = model.forward(tokens[:, 28:], state)
        assert_close(got, want, bound)
    assert_states_close(state, state_want, bound)


@pytest.mark.parametrize("name", ["all", "untied, qk-norm, bias", "norms in the ssm", "l2 of the input", "mamba"])
def test_models_equal_the_oracle(name: str, bodies: set[str]) -> None:
    config = GRID[name]
    weights = random_weights(config)
    check(config, weights, load_weights(Model(config), weights), BOUND, Run(mode="fast"))
    assert bodies >= (BODIES if config.n_eidetic and name != "mamba" else {"conv", "scan"})


def test_a_model_passes_the_checker() -> None:
    config = GRID["all"]
    weights = random_weights(config)
    check(config, weights, load_weights(Model(config), weights), BOUND, Run(mode="check"))


def test_prompts_of_many_chunks(monkeypatch: pytest.MonkeyPatch, bodies: set[str]) -> None:
    monkeypatch.setattr(bmojo_metal.scan, "SEQUENTIAL", 8)
    monkeypatch.setattr(bmojo_metal.scan, "CHUNK", 6)
    config = GRID["all"]
    weights = random_weights(config)
    check(config, weights, load_weights(Model(config), weights), BOUND, Run(mode="fast"))
    assert bodies >= {"scan_ends", "scan_starts"}


def test_quantised_models_equal_the_oracle_on_the_dequantised_weights(bodies: set[str]) -> None:
    rule = Quantization(bits=4, group_size=32)
    config = odd(
        d_model=32, d_ff=64, head_dim=8, n_heads=4, n_kv_heads=2, vocab_size=64, quantization=rule,
        ssm={"kind": "mamba", "d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": 32},
    )  # fmt: skip
    weights = random_weights(config)
    packed: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        parts = quantize(weight, rule) if is_quantizable(name, weight.shape, rule) else (weight,)
        owner = name.removesuffix("weight")
        packed |= dict(zip((name, f"{owner}scales", f"{owner}biases"), parts, strict=False))
    check(config, dequantized(packed, rule), load_weights(Model(config), packed), BOUND, Run(mode="fast"))
    assert bodies >= BODIES
