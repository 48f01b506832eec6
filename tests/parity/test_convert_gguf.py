"""GGUF files written by the gguf package: converted logits equal those of the transformers model they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from bmojo_convert import ConvertError, convert
from bmojo_edge import checkpoint
from bmojo_edge.config import Config
from bmojo_edge.rope import turns_per_token
from tests.parity import foreign

ROUNDING = 2e-6
# Rows of whole blocks of 32, so that every matrix can be quantised.
WIDE = {"hidden_size": 64, "intermediate_size": 96}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantisation", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_logits(kind: str, quantisation: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = WIDE | ({"head_dim": 32} if kind == "qwen3" else {})
    model = foreign.round_weights(foreign.model(kind, **fields), Kind[quantisation])
    source = foreign.write_gguf(model, tmp_path / "model.gguf", Kind[quantisation])
    out = convert(source, tmp_path / "out", dtype="float32")
    for length in (1, 60):
        assert foreign.distance(model, out, length) < ROUNDING
    config, _ = checkpoint.read(out)
    assert config.norm_eps == 1e-6  # the decimal that was meant, not its float32


def test_tied(tmp_path: Path) -> None:
    model = foreign.model("llama", tie_word_embeddings=True)
    out = convert(foreign.write_gguf(model, tmp_path / "model.gguf"), tmp_path / "out", dtype="float32")
    assert checkpoint.read(out)[0].tie_embeddings
    assert foreign.distance(model, out, 20) < ROUNDING


def test_biases_of_llama_are_reordered_too(tmp_path: Path) -> None:
    """Q and k biases go through the same change of order as the rows they belong to."""
    model = foreign.model("qwen2")
    out = convert(foreign.write_gguf(model, tmp_path / "m.gguf", architecture="llama"), tmp_path / "out")
    assert checkpoint.read(out)[0].attention_bias
    assert foreign.distance(model, out, 20) < 2e-3


def test_sliding_window(tmp_path: Path) -> None:
    model = foreign.model("mistral", sliding_window=9)
    source = foreign.write_gguf(
        model, tmp_path / "m.gguf", architecture="llama", metadata={"llama.attention.sliding_window": 9}
    )
    assert foreign.distance(model, convert(source, tmp_path / "out", dtype="float32"), 40) < ROUNDING


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_linear_and_yarn(architecture: str, tmp_path: Path) -> None:
    scaling = f"{architecture}.rope.scaling."
    linear = foreign.model(architecture, rope_parameters=foreign.LINEAR)
    keys = {f"{scaling}type": "linear", f"{scaling}factor": 2.0}
    source = foreign.write_gguf(linear, tmp_path / "linear.gguf", metadata=keys)
    assert foreign.distance(linear, convert(source, tmp_path / "linear", dtype="float32"), 75) < ROUNDING
    source = foreign.write_gguf(linear, tmp_path / "old.gguf", metadata={f"{architecture}.rope.scale_linear": 2.0})
    assert foreign.distance(linear, convert(source, tmp_path / "old", dtype="float32"), 75) < ROUNDING
    yarn = foreign.model(architecture, rope_parameters=foreign.YARN)
    keys = {f"{scaling}type": "yarn", f"{scaling}factor": 4.0, f"{scaling}original_context_length": 64}
    source = foreign.write_gguf(yarn, tmp_path / "yarn.gguf", metadata=keys)
    assert foreign.distance(yarn, convert(source, tmp_path / "yarn", dtype="float32"), 75) < ROUNDING


def _llama3_factors(theta: float, head_dim: int, context: int, factor: float, low: float, high: float) -> np.ndarray:
    """What llama.cpp's conversion writes as rope_freqs.weight, following its own description."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    factors = []
    for wavelength in wavelengths:
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("theta", "head_dim", "context", "factor", "low", "high"),
    [
        (500_000.0, 128, 8192, 8.0, 1.0, 4.0),  # Llama 3.1
        (500_000.0, 64, 8192, 32.0, 1.0, 4.0),  # Llama 3.2
        (500.0, 12, 64, 8.0, 1.0, 4.0),  # one frequency between
        (10_000.0, 12, 64, 8.0, 2.0, 2.5),  # none
        (10_000.0, 64, 300, 4.0, 0.7, 9.0),
    ],
)
def test_llama3_from_its_factors(
    theta: float, head_dim: int, context: int, factor: float, low: float, high: float, tmp_path: Path
) -> None:
    """The scaling is found again from the factors alone, though GGUF keeps neither context nor thresholds."""
    model = foreign.model(
        "llama",
        head_dim=head_dim,
        num_hidden_layers=1,
        max_position_embeddings=16_384,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
            "high_freq_factor": high, "original_max_position_embeddings": context,
        },
    )  # fmt: skip
    factors = _llama3_factors(theta, head_dim, context, factor, low, high)
    source = foreign.write_gguf(model, tmp_path / "m.gguf", rope_freqs=factors)
    config, _ = checkpoint.read(convert(source, tmp_path / "out", dtype="float32"))
    assert config.rope_scaling is not None
    assert config.rope_scaling.rope_type == "llama3"
    if context == 8192:
        assert (config.rope_scaling.factor, config.rope_scaling.low_freq_factor) == (factor, low)
        assert config.rope_scaling.high_freq_factor == high
    same = config.replace(
        rope_scaling={
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
    )  # fmt: skip
    got, ref = (_frequencies(c) for c in (config, same))
    np.testing.assert_allclose(got, ref, rtol=5e-6)
    assert foreign.distance(model, tmp_path / "out", 40) < ROUNDING


def _frequencies(config: Config) -> np.ndarray:
    turns = turns_per_token(config)
    assert turns is not None
    return turns.astype(np.float64)


def test_factors_that_are_not_llama3(tmp_path: Path) -> None:
    model = foreign.model("llama")
    source = foreign.write_gguf(model, tmp_path / "m.gguf", rope_freqs=np.array([1, 5, 2, 7, 3, 8.0]))
    with pytest.raises(ConvertError, match=r"m\.gguf: tensor 'rope_freqs\.weight' is not a llama3 scaling"):
        convert(source, tmp_path / "out")


def test_split_files(tmp_path: Path) -> None:
    """A model in two files is read as one, and a part that is missing is named."""
    import gguf

    model = foreign.model("llama")
    whole = gguf.GGUFReader(foreign.write_gguf(model, tmp_path / "whole.gguf"))
    names = [tensor.name for tensor in whole.tensors]
    parts = [tmp_path / f"model-0000{n}-of-00002.gguf" for n in (1, 2)]
    for n, part in enumerate(parts):
        foreign.write_gguf(model, part, only=lambda name, n=n: (names.index(name) % 2 == 0) == (n == 0))
    out = convert(parts[0], tmp_path / "out", dtype="float32")
    assert foreign.distance(model, out, 20) < ROUNDING
    parts[1].unlink()
    with pytest.raises(ConvertError, match=r"model-00002-of-00002\.gguf: file is missing"):
        convert(parts[0], tmp_path / "again")
