"""Configurations of the mamba2, gdn and gka mixers that their tests share: every option, sizes that divide nothing."""

from __future__ import annotations

from typing import Any

from bmojo_edge.config import Config
from tests.helpers import odd

_HEADS = {"n_heads": 4, "n_k_heads": 2, "n_v_heads": 2, "head_dim": 6}

SSMS: dict[str, dict[str, Any]] = {
    "mamba2": {"kind": "mamba2", "head_dim": 5, "d_state": 7},
    "mamba2, groups, biases, dt limits": {
        "kind": "mamba2", "head_dim": 5, "d_state": 3, "n_groups": 4, "bias": True, "dt_limit": [0.05, 0.3],
    },
    "mamba2, no conv bias, conv of one": {
        "kind": "mamba2", "head_dim": 10, "d_state": 4, "n_groups": 2, "conv_bias": False, "d_conv": 1,
    },
    "mamba2, few heads of x and B, their norms": {
        "kind": "mamba2", "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "d_state": 6, "bc_norm": True,
    },
    "gdn": {"kind": "gdn"},
    "gdn, no gate, no conv, negative": {
        "kind": "gdn", "use_gate": False, "use_short_conv": False, "allow_neg_eigval": True,
    },
    "gdn, more heads of v, conv bias": {
        "kind": "gdn", "n_heads": 2, "n_k_heads": 2, "n_v_heads": 4, "head_dim": 5, "conv_bias": True, "d_conv": 3,
    },
    "gdn, low rank": {"kind": "gdn", **_HEADS, "kv_proj_rank": 3, "allow_neg_eigval": True},
    "gdn, low rank, learned": {"kind": "gdn", **_HEADS, "kv_proj_rank": 3, "kv_learnable_residual": True},
    "gka": {"kind": "gka"},
    "gka, bare": {
        "kind": "gka", "use_gate": False, "use_v_conv": False, "use_beta_gate": False, "use_alpha_connection": False,
        "use_forgetting_gate": False, "gla_rescale": False, "num_iter": 4,
    },
    "gka, H keeps everything": {"kind": "gka", "use_forgetting_gate_kk": False, "ridge_strength": 0.1, "d_conv": 2},
    "gka, no steps": {"kind": "gka", "num_iter": 0},
    "gka, low rank, learned": {"kind": "gka", **_HEADS, "kv_proj_rank": 2, "kv_learnable_residual": True},
}  # fmt: skip


def alone(name: str, **overrides: Any) -> Config:
    """Two layers of the mixer alone."""
    ssm = SSMS[name]
    return odd(ssm["kind"], ssm["kind"], ssm=ssm, **{"rope_theta": None, **overrides})


def within(name: str, **overrides: Any) -> Config:
    """Two bmojo layers around the mixer."""
    return odd(ssm=SSMS[name], **overrides)


def bound(config: Config, dtype: str = "float32") -> float:
    """RMS-error ratio allowed. gka divides by what it remembers: its outputs cancel where queries miss every key."""
    ssm = config.ssm_of(0)
    loose = ssm is not None and ssm.kind == "gka"
    return {"float32": 1e-4 if loose else 5e-6, "float16": 2e-2, "bfloat16": 1e-1}[dtype]
