"""The PyTorch model as an object: initialisation, dtypes, states as specified, loading from a folder."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from bmojo_edge import checkpoint
from bmojo_edge.config import Config, Quantization
from bmojo_edge.state import leaves, state_spec
from tests.helpers import GRID, assert_close, assert_states_close, odd, random_tokens, random_weights, rms_ratio

torch = pytest.importorskip("torch")

from bmojo_edge.torch import Model, load, load_weights  # noqa: E402


def test_initialisation_is_that_of_mambas_code() -> None:
    torch.manual_seed(0)
    config = Config.preset("tiny", d_model=128, d_ff=256, n_layers=3, attention_bias=True, tie_embeddings=False)
    model, weights = Model(config), dict(Model(config).state_dict())
    residual = 2 * 3  # projections into the stream: a mixer's and an MLP's in each of three layers
    for name, w in weights.items():
        fan_in, last = w.shape[-1], name.rsplit(".", 2)[-2:]
        if name == "embed.weight":
            assert abs(float(w.std()) / 0.02 - 1) < 0.05
        elif last[0] in ("o_proj", "down_proj"):
            bound = 1 / math.sqrt(fan_in * residual)
            assert 0.9 * bound < float(w.abs().max()) <= bound * 1.0001, name
        elif last[0] == "dt_proj" and last[1] == "bias":
            steps = torch.nn.functional.softplus(w)
            assert 1e-4 <= float(steps.min()) < 2e-3 < 0.05 < float(steps.max()) <= 0.1001
            assert abs(float(steps.log().mean()) - math.log(1e-2)) < 0.3  # log-uniform between 1e-3 and 1e-1
        elif last[1] == "A_log":
            assert torch.equal(w, torch.arange(1.0, 17).log().expand_as(w))
        elif last[1] == "D" or name.endswith("norm.weight"):
            assert torch.equal(w, torch.ones_like(w)), name
        elif last == ["conv", "bias"]:
            assert 0.4 < float(w.abs().max()) <= 0.5
        elif last[1] == "bias":
            assert not w.any(), name
        else:
            bound = 1 / math.sqrt(fan_in)
            assert 0.9 * bound < float(w.abs().max()) <= bound * 1.0001, name
    logits, _ = model(random_tokens(config, 2, 64))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, config.vocab_size, (128,)))
    assert abs(loss.item() - math.log(config.vocab_size)) < 0.3  # knows nothing yet


def test_two_models_of_one_seed_are_equal() -> None:
    config = odd()
    torch.manual_seed(3)
    first = Model(config).state_dict()
    torch.manual_seed(3)
    second = Model(config).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_states_are_as_specified(dtype: str) -> None:
    for config in GRID.values():
        config = config.replace(dtype=dtype)
        model = Model(config)
        state = model.init_state(3, offset=7)
        assert state.offset.tolist() == [7, 7, 7]
        with torch.no_grad():
            _, after = model(random_tokens(config, 3, 21), state)
            _, later = model.decode_one_token([1, 2, 3], after)
        for tokens, now in ((0, state), (21, after), (22, later)):
            for (name, leaf), (_, spec) in zip(leaves(now), leaves(state_spec(config, 3, tokens)), strict=True):
                assert (tuple(leaf.shape), str(leaf.dtype)) == (spec.shape, f"torch.{spec.dtype}"), name
            assert sum(leaf.nbytes for _, leaf in leaves(now)) == config.state_bytes(3, tokens)


def test_casting_a_model_keeps_its_config_true() -> None:
    model = Model(odd("bmojo"))
    for cast, dtype in ((model.half, "float16"), (model.bfloat16, "bfloat16"), (model.float, "float32")):
        cast()
        assert model.config.dtype == dtype
        assert {leaf.dtype for name, leaf in leaves(model.init_state()) if name.endswith("window.k")} == {
            getattr(torch, dtype)
        }  # fmt: skip


def test_the_scan_stays_float32_in_half_precision() -> None:
    model = Model(odd("mamba", rope_theta=None, dtype="bfloat16"))
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {f"layers.0.mixer.{name}" for name in ("A_log", "D", "dt_proj.bias")}


@torch.no_grad()
def test_a_growing_cache_grows_and_a_ring_does_not() -> None:
    config = odd("attention", "attention", ssm=None, attention_window=[None, 5], d_ff=0)
    model = Model(config)
    _, state = model(random_tokens(config, 2, 250), lengths=[250, 3])
    assert [layer.k.shape[2] for layer in state.layers] == [256, 5]
    for n in range(8):
        _, state = model.decode_one_token([0, 0], state, [True, n % 2 == 0])
    assert [layer.k.shape[2] for layer in state.layers] == [512, 5]
    assert state.position.tolist() == [258, 7]


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_saved_folder_loads(tmp_path, dtype: str) -> None:
    config = GRID["mixed"].replace(dtype=dtype)
    weights, tokens = random_weights(config), random_tokens(config, 2, 30)
    model = load_weights(Model(config), weights)
    checkpoint.save(tmp_path / "model", config, model.state_dict())
    loaded = load(tmp_path / "model")
    assert loaded.config == config
    assert loaded.tokenizer is None
    assert not loaded.training
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert b.requires_grad
    assert torch.equal(model(tokens)[0], loaded(tokens)[0])
    other = load(tmp_path / "model", dtype="float32")
    assert other.config.dtype == "float32"
    assert_close(other(tokens)[0], loaded(tokens)[0], 0.1)


@torch.no_grad()
def test_quantised_weights_are_dequantised(tmp_path) -> None:
    config = odd("bmojo", d_model=64, head_dim=16, d_ff=64, vocab_size=64)
    config = config.replace(quantization=Quantization(group_size=32, bits=8))
    weights = random_weights(config)
    checkpoint.save(tmp_path / "model", config, weights)
    loaded = load(tmp_path / "model")
    plain = load_weights(Model(config.replace(quantization=None)), weights)
    assert loaded.config.quantization is None
    tokens = random_tokens(config, 1, 30)
    ratio = rms_ratio(loaded(tokens)[0], plain(tokens)[0])
    assert 1e-4 < ratio < 0.1  # 8 bits: near, and not the same


def test_weights_that_do_not_fit_are_named() -> None:
    config = odd("bmojo")
    model, weights = Model(config), random_weights(config)
    before = model.embed.weight.clone()
    missing = {name: w for name, w in weights.items() if name != "norm.weight"}
    for wrong, match in (
        (missing, "norm.weight: is missing"),
        (weights | {"layers.7.norm.weight": weights["norm.weight"]}, "layers.7.norm.weight: is not a parameter"),
        (weights | {"norm.weight": np.ones(3)}, r"norm.weight: has shape \(3,\), the model has \(20,\)"),
    ):
        with pytest.raises(checkpoint.CheckpointError, match=match):
            load_weights(model, wrong)
    assert torch.equal(model.embed.weight, before)


def test_bfloat16_arrays_are_taken_bit_for_bit() -> None:
    config = odd("bmojo", dtype="bfloat16")
    weights = {name: w.astype(ml_dtypes.bfloat16) for name, w in random_weights(config).items()}
    model = load_weights(Model(config), weights)
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(p.detach().float().numpy(), weights[name].astype(np.float32))


@torch.no_grad()
def test_autocast_runs_and_keeps_the_scan_wide() -> None:
    config = GRID["all"]
    model, tokens = load_weights(Model(config), random_weights(config)), random_tokens(config, 2, 40)
    ref, ref_state = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, _, memory = model.forward_with_memory(tokens)
        got, state = model(tokens)
    same = model(tokens, eidetic_index=memory.eidetic_index)
    assert_close(got, same[0], 0.05)
    assert state.layers[0].ssm.ssm.dtype == torch.float32
    assert_states_close(state._replace(layers=()), ref_state._replace(layers=()), 0)
    assert ref.dtype == torch.float32


def test_one_step_of_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    for name in ("all", "mixed"):
        config = GRID[name]
        model, tokens = Model(config), torch.from_numpy(random_tokens(config, 4, 40))
        optimiser, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
        for _ in range(12):
            loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.3
