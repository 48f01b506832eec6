"""Tiny random checkpoints of other projects, built by their own libraries, and how to compare with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from bmojo_edge import checkpoint, golden, reference
from bmojo_edge.quantize import dequantized

_SIZES = {
    "vocab_size": 83,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
    "jamba": (transformers.JambaConfig, transformers.JambaForCausalLM),
}
_BACKBONE = {"vocab_size": 83, "hidden_size": 48, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "mamba": {**_BACKBONE, "state_size": 5},
    "mamba2": {**_BACKBONE, "state_size": 5, "num_heads": 8, "head_dim": 12, "n_groups": 2, "chunk_size": 16},
    "jamba": {
        **_SIZES, "num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 1,
        "mamba_d_state": 5,
    },
}  # fmt: skip

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}


def model(kind: str, seed: int = 0, **fields: Any) -> Any:
    """A random model whose every parameter matters: gains and biases too are random."""
    config_class, model_class = _CLASSES[kind]
    config = config_class(**{**_OWN_SIZES.get(kind, _SIZES), **fields})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    made = model_class(config).float().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("A_log"):
                rates = torch.arange(1.0, 1.0 + parameter.shape[-1]).log()
                parameter.copy_(rates + 0.1 * torch.randn_like(parameter))
            elif name.endswith(("dt_proj.bias", "dt_bias")):  # steps of about 0.13: some tens of tokens are remembered
                parameter.copy_(torch.randn_like(parameter) * 0.1 - 2)
            elif parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        # Sharp enough for a wrong rotation or window to show.
        for name, parameter in made.named_parameters():
            if "q_proj" in name or "embed" in name:
                parameter.mul_(2.0)
    return made


def save(made: Any, folder: Path, **options: Any) -> Path:
    """Save as transformers does."""
    made.save_pretrained(folder, **options)
    return folder


def tokens(length: int, vocab_size: int = _SIZES["vocab_size"]) -> np.ndarray:
    """Token ids (1, length)."""
    return np.random.default_rng(length).integers(0, vocab_size, (1, length))


def logits_of(made: Any, ids: np.ndarray) -> np.ndarray:
    """What transformers computes, (1, t, v)."""
    with torch.inference_mode():
        return made(torch.from_numpy(ids), use_cache=False).logits.numpy()


def converted_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """What the oracle computes from a folder of ours, (1, t, v)."""
    config, weights = checkpoint.read(folder)
    return reference.forward(config, dequantized(weights, config.quantization), ids)[0]


def distance(made: Any, folder: Path, length: int) -> float:
    """RMS error of a converted folder's logits over those of the model it was, relative."""
    ids = tokens(length, made.config.vocab_size)
    return golden.rms_ratio(converted_logits(folder, ids), logits_of(made, ids))


# --- GGUF -----------------------------------------------------------------------------------------------------------

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


def _gguf_name(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[part]}.{leaf}"
    return f"{_GGUF_NAMES[stem]}.{leaf}"


def _interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """The row order llama.cpp's conversion gives to q and k of the llama architecture."""
    halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def write_gguf(
    made: Any,
    path: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str | None = None,
    rope_freqs: np.ndarray | None = None,
    metadata: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    only: Callable[[str], bool] = lambda name: True,
) -> Path:
    """Write a transformers model as GGUF, its matrices quantised to `kind`.

    metadata adds or replaces keys (int, float, str, bool or list); tokenizer holds those under `tokenizer.ggml.`;
    only picks tensors by their GGUF names.
    """
    config, architecture = made.config, architecture or str(made.config.model_type)
    writer = GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": head_dim,
    }
    for key, value in {**{f"{architecture}.{k}": v for k, v in keys.items()}, **(metadata or {})}.items():
        _add(writer, key, value)
    for key, value in (tokenizer or {}).items():
        _add(writer, f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}", value)
    state = made.state_dict()
    tied = config.tie_word_embeddings
    for name, tensor in state.items():
        if not only(_gguf_name(name)) or (tied and name == "lm_head.weight"):
            continue
        array = tensor.numpy().astype(np.float32)
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            array = _interleave(array, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)
        if array.ndim == 2 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(_gguf_name(name), quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_gguf_name(name), array)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def round_weights(made: Any, kind: GGMLQuantizationType) -> Any:
    """Give a model the values its matrices have after GGUF quantisation."""
    from gguf.quants import dequantize

    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2 and kind != GGMLQuantizationType.F32:
                rounded = dequantize(quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(rounded))
    return made
