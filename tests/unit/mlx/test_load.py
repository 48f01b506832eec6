"""Model folders in MLX: dtypes, quantised weights as they are, what is refused, the golden logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bmojo_edge import checkpoint, golden, reference
from bmojo_edge.config import Config, Quantization
from bmojo_edge.quantize import dequantized
from tests.helpers import assert_close, assert_states_close, odd, random_tokens, random_weights, to_numpy

mx = pytest.importorskip("mlx.core")

from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from bmojo_edge.mlx import Model, load, load_weights  # noqa: E402
from bmojo_edge.mlx.layers import QuantizedExpertLinear  # noqa: E402

WIDE: dict[str, Any] = {"d_model": 64, "head_dim": 16, "d_ff": 96, "vocab_size": 64}


def parameters(model: Model) -> dict[str, Any]:
    flat: Any = tree_flatten(model.parameters())
    return dict(flat)


def saved(folder: Path, config: Config, seed: int = 0) -> Path:
    checkpoint.save(folder, config, random_weights(config, seed))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_as_stored_or_asked_for(dtype: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", odd("bmojo", dtype=dtype))
    for asked in (None, "float32", "float16", "bfloat16"):
        model = load(folder, dtype=asked)
        actual = asked or dtype
        assert model.config.dtype == actual
        for name, p in parameters(model).items():
            assert p.dtype == (mx.float32 if name.endswith((".A_log", ".D", ".dt_proj.bias")) else getattr(mx, actual))
        logits, state = model.forward(random_tokens(model.config, 1, 9))
        assert logits.dtype == getattr(mx, actual)
        assert state.layers[0].window.k.dtype == getattr(mx, actual)
        assert state.layers[0].ssm.ssm.dtype == mx.float32


def test_bfloat16_is_taken_bit_for_bit() -> None:
    config = odd("bmojo", dtype="bfloat16")
    weights = {name: w.astype(ml_dtypes.bfloat16) for name, w in random_weights(config).items()}
    for name, p in parameters(load_weights(Model(config), weights)).items():
        np.testing.assert_array_equal(to_numpy(p), weights[name].astype(np.float64))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_model_is_the_oracle_on_dequantised_weights(bits: int, tied: bool, tmp_path: Path) -> None:
    """Every kind of layer runs on packed weights: nothing is dequantised, and the numbers are the oracle's."""
    rule = Quantization(group_size=32, bits=bits)
    experts = {"n": 3, "per_token": 2, "layers": [1]}
    config = odd(
        "bmojo", "bmojo", "attention", "mamba", tie_embeddings=tied, quantization=rule, experts=experts, **WIDE
    )
    folder, plain = saved(tmp_path / "model", config), config.replace(quantization=None)
    _, stored = checkpoint.read(folder)
    model, weights = load(folder), dequantized(stored, rule)
    packed = {name.removesuffix(".scales") for name in parameters(model) if name.endswith(".scales")}
    assert packed == {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
    for owner in ("embed", "layers.0.mixer.q_proj", "layers.0.mixer.ssm.out_proj", "layers.3.mixer.in_proj"):
        assert owner in packed
    assert isinstance(model.embed, nn.QuantizedEmbedding)
    mlp: Any = model.layers[1].mlp
    assert isinstance(mlp.experts.up_proj, QuantizedExpertLinear)
    assert not packed & {"layers.1.mlp.router", "layers.0.mixer.ssm.dt_proj", "layers.0.norm"}
    assert parameters(model)["embed.weight"].dtype == mx.uint32
    tokens = random_tokens(config, 2, 40)
    ref, ref_state = reference.forward(plain, weights, tokens[:, :36])
    got, state = model.forward(tokens[:, :36])
    assert_close(got, ref, 2e-6)
    assert_states_close(state, ref_state, 2e-5)
    for token in tokens[:, 36:].T:
        ref, ref_state = reference.forward(plain, weights, token[:, None], ref_state)
        got, state = model.decode_one_token(token, state)
        assert_close(got, ref[:, 0], 5e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_quantised_in_half_precision(dtype: str, tmp_path: Path) -> None:
    rule = Quantization(group_size=32, bits=8)
    config = odd("bmojo", dtype=dtype, quantization=rule, **WIDE)
    folder, tokens = saved(tmp_path / "model", config), random_tokens(config, 1, 30)
    _, stored = checkpoint.read(folder)
    model = load(folder)
    assert parameters(model)["embed.scales"].dtype == getattr(mx, dtype)
    _, _, memory = model.forward_with_memory(tokens)
    plain, sets = config.replace(quantization=None), to_numpy(memory.eidetic_index)
    ref, _ = reference.forward(plain, dequantized(stored, rule), tokens, eidetic_index=sets)
    got, _ = model.forward(tokens)
    assert got.dtype == getattr(mx, dtype)
    assert_close(got, ref, 12 * 2.0 ** (-11 if dtype == "float16" else -8))
    wide = load(folder, dtype="float32")
    assert wide.config.dtype == "float32"
    ref, _ = reference.forward(plain, dequantized(stored, rule), tokens)
    assert_close(wide.forward(tokens)[0], ref, 2e-6)


def test_weights_that_do_not_fit_are_named() -> None:
    config = odd("bmojo")
    model, weights = Model(config), random_weights(config)
    before = np.array(model.embed.weight)
    missing = {name: w for name, w in weights.items() if name != "norm.weight"}
    for wrong, match in (
        (missing, "norm.weight: is missing"),
        (weights | {"layers.7.norm.weight": weights["norm.weight"]}, "layers.7.norm.weight: is not a parameter"),
        (weights | {"norm.weight": np.ones(3)}, r"norm.weight: has shape \(3,\), the model has \(20,\)"),
    ):
        with pytest.raises(checkpoint.CheckpointError, match=match):
            load_weights(model, wrong)
    np.testing.assert_array_equal(np.array(model.embed.weight), before)


def test_verify_compares_with_the_golden_logits(tmp_path: Path) -> None:
    config = odd("bmojo", "attention")
    folder, weights = saved(tmp_path / "model", config), random_weights(config)
    tokens = golden.tokens_for(config.vocab_size)
    logits = golden.oracle_logits(config, weights, tokens)
    golden.write(folder, golden.Golden(tokens, logits, "a test"))
    load(folder, verify=True)
    golden.write(folder, golden.Golden(tokens, logits * 1.1, "a test"))
    with pytest.raises(checkpoint.CheckpointError, match=r"golden\.safetensors: logits differ from those of a test"):
        load(folder, verify=True)
    load(folder)
    with pytest.raises(checkpoint.CheckpointError, match="nothing: no such"):
        load(tmp_path / "nothing")


def test_a_new_model_is_initialised_for_training_and_generates() -> None:
    config = Config.preset("tiny")
    model = Model(config)
    flat = parameters(model)
    assert 0.015 < float(flat["embed.weight"].std()) < 0.025
    A = np.array(flat["layers.0.mixer.ssm.A_log"])
    np.testing.assert_allclose(np.exp(A), np.broadcast_to(np.arange(1, 17), A.shape), rtol=1e-6)
    steps = np.log1p(np.exp(np.array(flat["layers.0.mixer.ssm.dt_proj.bias"])))
    assert (steps > 0.9e-3).all()
    assert (steps < 0.11).all()
    bound = config.d_ff**-0.5 / 2  # two layers of two projections into the residual stream
    assert 0.9 * bound < float(mx.abs(flat["layers.1.mlp.down_proj.weight"]).max()) <= bound
    assert np.isfinite(to_numpy(model.forward(random_tokens(config, 1, 50))[0])).all()
