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
from tests.helpers import (  # noqa: E402
    GRID,
    as_stored,
    assert_close,
    assert_states_close,
    odd,
    random_tokens,
    random_weights,
    to_numpy,
)
from tests.metal.case import kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("harness")

BOUND = 5e-6  # RMS-error ratio, float32
# What a bmojo layer around Mamba runs, in a call of many tokens and in decoding.
MAMBA = {"conv", "scan", "selective_scan_step", "add_rms_norm"}
BODIES = MAMBA | {"innovation", "innovation_step", "select", "eidetic_slots"}
BODIES |= {"memory_attention", "memory_attention_step", "rotate"}
# Unit roundoff of a dtype; multiples of it allowed in logits and states, as for the plain ops in tests/parity.
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
LOGITS, STATES = 24, 48


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
    assert bodies >= (BODIES if name != "mamba" else MAMBA)


def test_what_is_written_into_exports_equals_the_oracle(bodies: set[str]) -> None:
    """Kernels without their gradients, all inputs contiguous."""
    config = odd("bmojo")
    weights, tokens = random_weights(config), random_tokens(config, 1, 13)
    model, want = load_weights(Model(config), weights), reference.forward(config, weights, tokens)[0]
    with kernels(Run(mode="fast")), bmojo_metal.launch.exported():
        got, state = model.forward(tokens[:, :5])
        assert_close(got, want[:, :5], BOUND)
        got, state = model.forward(tokens[:, 5:12], state)
        assert_close(got, want[:, 5:12], BOUND)
        assert_close(model.decode_one_token(tokens[:, 12], state)[0], want[:, 12], BOUND)
    assert bodies >= BODIES


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


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("all", "float16"),
        ("all", "bfloat16"),
        ("untied, qk-norm, bias", "float16"),
        ("norms in the ssm", "bfloat16"),
        ("l2 of the input", "float16"),
        ("mamba", "bfloat16"),
    ],
)
def test_models_of_half_precision_equal_the_oracle(name: str, dtype: str, bodies: set[str]) -> None:
    """The oracle takes the model's own eidetic sets: which tokens are kept may hang on a rounded score."""
    config, u = GRID[name], ROUNDOFF[dtype]
    weights, tokens = as_stored(random_weights(config), dtype), random_tokens(config, 2, 30)
    model, eidetic = load_weights(Model(config.replace(dtype=dtype)), weights), name != "mamba"
    with kernels(Run(mode="fast")):
        got, state, memory = model.forward_with_memory(tokens[:, :22], model.init_state(2), lengths=np.array([22, 17]))
        sets = to_numpy(memory.eidetic_index) if eidetic else None
        want, state_want = reference.forward(config, weights, tokens[:, :22], lengths=[22, 17], eidetic_index=sets)
        assert_close(got, want, LOGITS * u)
        assert_states_close(state, state_want, STATES * u)
        for i in range(22, 30):
            lengths = [1, i % 3 > 0]
            got, state = model.decode_one_token(tokens[:, i], state, active=np.array(lengths, bool))
            if eidetic:
                sets = np.stack([to_numpy(layer.eidetic.positions) for layer in state.layers], axis=1)[:, :, None]
            want, state_want = reference.forward(
                config, weights, tokens[:, i : i + 1], state_want, lengths=lengths, eidetic_index=sets
            )
            assert got.dtype == getattr(mx, dtype)
            assert_close(got[:, None], want, LOGITS * u)
    assert_states_close(state, state_want, STATES * u)
    reads_ssm = eidetic and name != "l2 of the input"
    assert bodies >= (BODIES if eidetic else MAMBA) | ({"linear_wide"} if reads_ssm else set())


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
