"""Named configurations. Every state dimension is a multiple of 32 but the paper's d_state of 16."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

_MAMBA = MappingProxyType({"kind": "mamba", "d_state": 16, "d_conv": 4, "expand": 2})


def _bmojo(n_layers: int, **fields: Any) -> dict[str, Any]:
    return {"layer_types": ("bmojo",) * n_layers, "ssm": _MAMBA, "innovation": {}, "tie_embeddings": True, **fields}


PRESETS: dict[str, dict[str, Any]] = {
    # For tests: every memory turns over within a hundred tokens.
    "tiny": _bmojo(
        2, vocab_size=256, d_model=64, d_ff=128, n_heads=2, n_kv_heads=1, head_dim=32, window=32, n_eidetic=32
    ),
    # Trains on a laptop or in minutes on one GPU.
    "small": _bmojo(
        8, vocab_size=8192, d_model=384, d_ff=1024, n_heads=6, n_kv_heads=2, head_dim=64, window=256, n_eidetic=128
    ),
    # The paper's sizes, its window of 512 and its tokenizer family's 32,000 pieces.
    "130m": _bmojo(
        12, vocab_size=32000, d_model=768, d_ff=1536, n_heads=12, n_kv_heads=4, head_dim=64, window=512, n_eidetic=256
    ),
    "370m": _bmojo(
        24, vocab_size=32000, d_model=1024, d_ff=2048, n_heads=16, n_kv_heads=4, head_dim=64, window=512, n_eidetic=256
    ),
    "790m": _bmojo(
        24, vocab_size=32000, d_model=1536, d_ff=3072, n_heads=24, n_kv_heads=8, head_dim=64, window=512, n_eidetic=256
    ),
    "1.4b": _bmojo(
        24, vocab_size=32000, d_model=2048, d_ff=4096, n_heads=32, n_kv_heads=8, head_dim=64, window=512, n_eidetic=256
    ),
}
