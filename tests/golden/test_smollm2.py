"""SmolLM2-135M-Instruct, converted: the logits, the text and the answers of the model it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from bmojo_convert import convert
from bmojo_edge import checkpoint, golden
from bmojo_edge.tokenizer import Tokenizer
from bmojo_edge.torch import load

TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair."
)


@pytest.fixture(scope="module")
def original(smollm2_gguf: Path) -> Any:
    """The same file as transformers' own code reads, reorders and dequantises it."""
    config = transformers.LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )
    config._attn_implementation = "eager"
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    content = load_gguf_checkpoint(smollm2_gguf, return_tensors=True, model_to_load=empty)
    made = transformers.LlamaForCausalLM(config)
    state = {**content["tensors"], "lm_head.weight": content["tensors"]["model.embed_tokens.weight"]}
    made.load_state_dict(state, strict=True)
    return made.eval()


@pytest.fixture(scope="module")
def expected(original: Any, smollm2: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (1, t) of a text and transformers' logits (1, t, v) for them."""
    ids = torch.tensor([Tokenizer.load(smollm2).encode(TEXT)])
    with torch.inference_mode():
        return ids, original(ids, use_cache=False).logits


def _compared(folder: Path, expected: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """RMS ratio of a folder's logits, and mean KL divergence in nats of its distribution from the original's."""
    ids, ref = expected
    with torch.inference_mode():
        got = load(folder, dtype="float32")(ids)[0]
    p, q = ref.double().log_softmax(-1), got.double().log_softmax(-1)
    return golden.rms_ratio(got.numpy(), ref.numpy()), float((p.exp() * (p - q)).sum(-1).mean())


def test_full_attention(smollm2: Path, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    config, _ = checkpoint.read(smollm2)
    assert (config.d_model, config.n_heads, config.kv_heads, config.d_head) == (576, 9, 3, 64)
    assert (len(config.layer_types), config.d_ff, config.vocab_size) == (30, 1536, 49_152)
    assert (config.rope_theta, config.norm_eps, config.tie_embeddings) == (100_000.0, 1e-5, True)
    assert set(config.layer_types) == {"attention"}
    ratio, divergence = _compared(smollm2, expected)
    assert ratio < 1e-5
    assert abs(divergence) < 1e-9


def test_golden_logits(smollm2: Path, original: Any) -> None:
    """The file holds what transformers gives for its tokens, and the loaded model gives it too."""
    made = golden.read(smollm2)
    assert made is not None
    with torch.inference_mode():
        ref = original(torch.from_numpy(made.tokens[None]), use_cache=False).logits[0].numpy()
    assert golden.rms_ratio(made.logits, ref) < 1e-5
    load(smollm2, verify=True)


# Measured: 3e-6; 7e-4 and 1.3e-6; 4.5e-3 and 6e-5; 0.026 and 1.4e-3; 0.34 and 0.47 (a small model suffers from 4 bits).
@pytest.mark.parametrize(
    ("options", "ratio", "divergence"),
    [
        ({"window": 1024, "dtype": "float32"}, 1e-5, 1e-9),
        pytest.param({"window": 128, "sinks": 0, "dtype": "float32"}, 1e-5, 1e-9, marks=pytest.mark.slow),
        pytest.param({"dtype": "float16"}, 2e-3, 5e-6, marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16"}, 1e-2, 2e-4, marks=pytest.mark.slow),
        pytest.param({"q_bits": 8, "dtype": "float32"}, 5e-2, 4e-3, marks=pytest.mark.slow),
        pytest.param({"q_bits": 4, "dtype": "float32"}, 0.5, 0.8, marks=pytest.mark.slow),
    ],
)
def test_variants(
    options: dict[str, Any],
    ratio: float,
    divergence: float,
    smollm2: Path,
    expected: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
) -> None:
    """Memories that hold the whole text change nothing; rounding costs what it was measured to."""
    got = _compared(convert(smollm2, tmp_path / "out", **options), expected)
    assert got[0] < ratio
    assert abs(got[1]) < divergence


@pytest.mark.slow
def test_same_weights_from_both_formats(smollm2: Path, original: Any, tmp_path: Path) -> None:
    """The model saved by transformers and converted from there is the one converted from GGUF, bit for bit."""
    original.save_pretrained(tmp_path / "source")
    out = convert(tmp_path / "source", tmp_path / "out", dtype="float32")
    (config, weights), (ref_config, ref) = checkpoint.read(out), checkpoint.read(smollm2)
    assert config == ref_config
    assert list(weights) == list(ref)
    for name in ref:
        np.testing.assert_array_equal(weights[name], ref[name])
    assert golden.read(out).author.startswith("transformers")  # pyright: ignore[reportOptionalMemberAccess]


def test_tokenizer(smollm2: Path) -> None:
    """Ids that the publisher's own tokenizer gives."""
    tokenizer = Tokenizer.load(smollm2)
    assert tokenizer.eos_ids == {2}
    assert tokenizer.bos_id == 1
    assert tokenizer.encode("What is the capital of France? 1234") == [
        1780, 314, 260, 3575, 282, 4649, 47, 216, 33, 34, 35, 36,
    ]  # fmt: skip
    rendered = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert rendered == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert ids[:3] == [1, 9690, 198]
    assert ids.count(1) == 3
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == [2]


def test_answer(smollm2: Path) -> None:
    """A question about France is answered with Paris, greedily."""
    tokenizer, model = Tokenizer.load(smollm2), load(smollm2)
    tokens = torch.tensor([tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])])
    answer: list[int] = []
    with torch.inference_mode():
        logits, state = model(tokens)
        while len(answer) < 20:
            answer.append(int(logits[0, -1].argmax()))
            if answer[-1] in tokenizer.eos_ids:
                break
            logits, state = model(torch.tensor([[answer[-1]]]), state)
    assert "Paris" in tokenizer.decode(answer)


def _left_in_ggufs_order(layers: range, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of q and k as llama.cpp interleaves them."""
    wrong = dict(weights)
    for i in layers:
        for name, heads in (("q", 9), ("k", 3)):
            key = f"layers.{i}.mixer.{name}_proj.weight"
            wrong[key] = weights[key].reshape(heads, 2, 32, -1).swapaxes(1, 2).reshape(weights[key].shape)
    return wrong


@pytest.mark.slow
def test_mistakes_show(smollm2: Path) -> None:
    """What a wrong reading of the model would do to the golden logits is more than `convert` lets pass."""
    (config, stored), made = checkpoint.read(smollm2), golden.read(smollm2)
    assert made is not None
    weights = {name: stored[name] for name in stored}

    def ratio(changes: dict[str, Any], weights: dict[str, np.ndarray] = weights) -> float:
        return golden.rms_ratio(golden.oracle_logits(config.replace(**changes), weights, made.tokens), made.logits)

    limit = golden.conversion_bound(config)
    assert ratio({}) < limit / 10
    assert ratio({}, _left_in_ggufs_order(range(30), weights)) > 0.2
    assert ratio({}, _left_in_ggufs_order(range(17, 18), weights)) > 0.01
    assert ratio({"rope_theta": 1e4}) > 0.04
    assert ratio({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}) > 0.1
    assert ratio({"norm_eps": 1e-6}) > 2 * limit
