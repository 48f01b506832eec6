"""The `ssm` table of a configuration: which state-space mixer a layer has, its options and its derived sizes.

One flat table serves every kind, so that a model whose layers name several kinds needs only one. It knows nothing of
arrays. Equations and parameter names: docs/mixers.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from bmojo_edge.checks import check_bool, check_choice, check_int, check_number, fail

SSM_KINDS = ("mamba", "mamba2", "gdn", "gka")

# RMSNorm on B and C of a mamba2 mixer; Hybrid Model Factory fixes it whatever the model's norm_eps is.
BC_NORM_EPS = 1e-6

# Given as a default to a field: None until `resolve` puts the kind's own default in its place.
_BY_KIND: Any = None

# The fields each kind reads, with its defaults; None here is a value of its own or is derived in `resolve`.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba": {
        "d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": None, "dt_bc_norm": False, "bias": False, "conv_bias": True,
    },
    "mamba2": {
        "d_state": 128, "d_conv": 4, "expand": None, "n_heads": None, "head_dim": None, "n_groups": None,
        "n_kv_heads": None, "bc_norm": False, "dt_limit": (0.0, None), "bias": False, "conv_bias": True,
        "norm_eps": 1e-5,
    },
    "gdn": {
        "d_conv": 4, "n_heads": None, "n_k_heads": None, "n_v_heads": None, "head_dim": None, "conv_bias": False,
        "norm_eps": 1e-5, "use_gate": True, "use_short_conv": True, "allow_neg_eigval": False, "kv_proj_rank": None,
        "kv_learnable_residual": False,
    },
    "gka": {
        "d_conv": 4, "n_heads": None, "n_k_heads": None, "n_v_heads": None, "head_dim": None, "conv_bias": False,
        "norm_eps": 1e-6, "use_gate": True, "use_v_conv": True, "use_beta_gate": True, "use_alpha_connection": True,
        "use_forgetting_gate": True, "use_forgetting_gate_kk": True, "gla_rescale": True, "num_iter": 30,
        "ridge_strength": 0.02, "kv_proj_rank": None, "kv_learnable_residual": False,
    },
}  # fmt: skip

_LEAST = {"num_iter": 0}  # every other integer is at least 1


@dataclass(frozen=True, slots=True)
class SSM:
    """The state-space mixer of a layer (docs/model.md section 4, docs/mixers.md).

    A field left None has the default of the layer's kind; `Config.ssm_of(layer)` is concrete. Types are those of
    concrete tables. Fields a kind does not read are those of other kinds in the same model.
    """

    kind: str = "mamba"
    d_state: int = _BY_KIND  # mamba 16, mamba2 128
    d_conv: int = _BY_KIND  # 4
    expand: int = _BY_KIND  # mamba 2; mamba2: 2 where n_heads and head_dim do not say
    dt_rank: int | None = None  # mamba: ceil(d_model / 16)
    dt_bc_norm: bool = _BY_KIND  # mamba: RMSNorm on dt, B and C, as Jamba has it
    bias: bool = _BY_KIND  # mamba, mamba2: on in_proj and out_proj
    conv_bias: bool = _BY_KIND  # mamba, mamba2: true; gdn, gka: false
    n_heads: int = _BY_KIND  # mamba2: expand * d_model / head_dim; gdn, gka: query heads, those of the attention
    head_dim: int = _BY_KIND  # mamba2: 64, or the attention's where 64 does not divide; gdn, gka: the attention's
    n_groups: int = _BY_KIND  # mamba2: groups of C (and of B) and of the gated norm; 1, or n_heads with n_kv_heads
    n_kv_heads: int | None = None  # mamba2: heads of x and B, repeated to n_heads; null: x has n_heads, B n_groups
    bc_norm: bool = _BY_KIND  # mamba2: RMSNorm per head on B and C before the convolution
    dt_limit: tuple[float, float | None] = _BY_KIND  # mamba2: least and largest dt, null = no limit
    norm_eps: float = _BY_KIND  # of the output norm: mamba2, gdn 1e-5, gka 1e-6
    n_k_heads: int = _BY_KIND  # gdn, gka: the attention's n_kv_heads
    n_v_heads: int = _BY_KIND  # gdn, gka: the attention's n_kv_heads
    use_gate: bool = _BY_KIND  # gdn, gka: SiLU gate on the output
    use_short_conv: bool = _BY_KIND  # gdn: convolutions on q, k, v; without them SiLU alone
    allow_neg_eigval: bool = _BY_KIND  # gdn: beta in (0, 2)
    kv_proj_rank: int | None = None  # gdn, gka: low-rank term added to the repeated k and v heads
    kv_learnable_residual: bool = _BY_KIND  # gdn, gka: the repetition itself is learned; needs kv_proj_rank
    use_v_conv: bool = _BY_KIND  # gka
    use_beta_gate: bool = _BY_KIND  # gka: k and v scaled by beta
    use_alpha_connection: bool = _BY_KIND  # gka: q + alpha (x - q); without it x
    use_forgetting_gate: bool = _BY_KIND  # gka: H and U decay
    use_forgetting_gate_kk: bool = _BY_KIND  # gka: H decays too
    gla_rescale: bool = _BY_KIND  # gka: output scaled by head_dim^-1/2
    num_iter: int = _BY_KIND  # gka: Chebyshev steps; 0 reads with q itself
    ridge_strength: float = _BY_KIND  # gka: lambda over the Frobenius norm of H

    def __post_init__(self) -> None:
        check_choice("ssm.kind", self.kind, SSM_KINDS)
        for field in dataclasses.fields(self):
            name, value, kind = f"ssm.{field.name}", getattr(self, field.name), str(field.type)
            if value is None or field.name == "kind":
                continue
            if field.name == "dt_limit":
                object.__setattr__(self, "dt_limit", _dt_limit(value))
            elif kind.startswith("bool"):
                check_bool(name, value)
            elif kind.startswith("int"):
                check_int(name, value, _LEAST.get(field.name, 1))
            else:
                check_number(name, value, 0.0)


def _dt_limit(value: object) -> tuple[float, float | None]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        fail("ssm.dt_limit", f"must be two numbers, the second null for no limit, got {value!r}")
    low, high = value
    if high is not None:
        check_number("ssm.dt_limit", high, 0.0)
        check_number("ssm.dt_limit", high - low, 0.0)
    if low != 0:
        check_number("ssm.dt_limit", low, 0.0)
    return (float(low), None if high is None else float(high))


def fields_of(kind: str) -> frozenset[str]:
    """Names of the fields a kind reads."""
    return frozenset(_DEFAULTS[kind])


def default_of(kind: str, name: str) -> Any:
    """What a kind takes for a field left out; None where it follows from other sizes."""
    return _DEFAULTS[kind][name]


@functools.lru_cache(maxsize=1024)
def resolve(ssm: SSM, kind: str, d_model: int, n_heads: int, n_kv_heads: int, head_dim: int) -> SSM:
    """`ssm` as a layer of `kind` reads it: every field of the kind concrete, the fields of other kinds left alone.

    n_heads, n_kv_heads and head_dim are the attention's. Raises ConfigError where sizes do not fit each other.
    """
    found = {name: default for name, default in _DEFAULTS[kind].items() if getattr(ssm, name) is None}
    ssm = dataclasses.replace(ssm, kind=kind, **found)
    if kind == "mamba":
        return dataclasses.replace(ssm, dt_rank=ssm.dt_rank or math.ceil(d_model / 16))
    if kind == "mamba2":
        return _resolve_mamba2(ssm, d_model, head_dim)
    ssm = dataclasses.replace(
        ssm,
        n_heads=ssm.n_heads or n_heads,
        n_k_heads=ssm.n_k_heads or n_kv_heads,
        n_v_heads=ssm.n_v_heads or n_kv_heads,
        head_dim=ssm.head_dim or head_dim,
    )
    heads = max(ssm.n_heads, ssm.n_k_heads, ssm.n_v_heads)
    for name in ("n_heads", "n_k_heads", "n_v_heads"):
        if heads % getattr(ssm, name):
            fail(f"ssm.{name}", f"must divide the largest number of heads ({heads}), got {getattr(ssm, name)}")
    if ssm.kv_learnable_residual and ssm.kv_proj_rank is None:
        fail("ssm.kv_learnable_residual", "needs ssm.kv_proj_rank")
    return ssm


def _resolve_mamba2(ssm: SSM, d_model: int, head_dim: int) -> SSM:
    d_inner = (ssm.expand or 2) * d_model
    if ssm.n_heads is None:
        p = ssm.head_dim or (64 if d_inner % 64 == 0 else head_dim)
        if d_inner % p:
            fail("ssm.head_dim", f"must divide expand * d_model ({d_inner}), got {p}")
        ssm = dataclasses.replace(ssm, head_dim=p, n_heads=d_inner // p)
    elif ssm.head_dim is None:
        if d_inner % ssm.n_heads:
            fail("ssm.n_heads", f"must divide expand * d_model ({d_inner}) without ssm.head_dim, got {ssm.n_heads}")
        ssm = dataclasses.replace(ssm, head_dim=d_inner // ssm.n_heads)
    if ssm.expand is not None and ssm.expand * d_model != ssm.n_heads * ssm.head_dim:
        inner = ssm.n_heads * ssm.head_dim
        fail("ssm.expand", f"times d_model is {ssm.expand * d_model}, but ssm.n_heads * ssm.head_dim is {inner}")
    if ssm.n_groups is None:
        ssm = dataclasses.replace(ssm, n_groups=1 if ssm.n_kv_heads is None else ssm.n_heads)
    for name in ("n_groups", "n_kv_heads"):
        n = getattr(ssm, name)
        if n is not None and ssm.n_heads % n:
            fail(f"ssm.{name}", f"must divide ssm.n_heads ({ssm.n_heads}), got {n}")
    return ssm


class Mamba2Sizes(NamedTuple):
    """Heads and groups of a mamba2 mixer; x, B and C are repeated to `heads` where they have fewer."""

    heads: int
    head_dim: int
    d_state: int
    x_heads: int
    b_groups: int
    c_groups: int

    @property
    def d_inner(self) -> int:
        """Width of z and of the output."""
        return self.heads * self.head_dim

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of x, B and C, the inputs of the convolution in this order."""
        return self.x_heads * self.head_dim, self.b_groups * self.d_state, self.c_groups * self.d_state


def mamba2_sizes(ssm: SSM) -> Mamba2Sizes:
    """Sizes of a concrete mamba2 table."""
    x_heads, b_groups = ssm.n_kv_heads or ssm.n_heads, ssm.n_kv_heads or ssm.n_groups
    return Mamba2Sizes(ssm.n_heads, ssm.head_dim, ssm.d_state, x_heads, b_groups, ssm.n_groups)


class DeltaSizes(NamedTuple):
    """Heads of a gdn or gka mixer; q, k and v are brought to `heads` after their convolutions."""

    heads: int
    q_heads: int
    k_heads: int
    v_heads: int
    head_dim: int
    expands_kv: bool  # k and v get the low-rank term of kv_proj_rank

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of q, k and v as projected."""
        return self.q_heads * self.head_dim, self.k_heads * self.head_dim, self.v_heads * self.head_dim


def delta_sizes(ssm: SSM) -> DeltaSizes:
    """Sizes of a concrete gdn or gka table."""
    heads = max(ssm.n_heads, ssm.n_k_heads, ssm.n_v_heads)
    expands = ssm.kv_proj_rank is not None and min(ssm.n_k_heads, ssm.n_v_heads) < heads
    return DeltaSizes(heads, ssm.n_heads, ssm.n_k_heads, ssm.n_v_heads, ssm.head_dim, expands)


def conv_channels(ssm: SSM, d_model: int) -> int:
    """Channels of a concrete table's short convolution: x | x, B, C | q, k, v; 0 where it has none."""
    if ssm.kind == "mamba":
        return ssm.expand * d_model
    if ssm.kind == "mamba2":
        return sum(mamba2_sizes(ssm).widths)
    q, k, v = delta_sizes(ssm).widths
    if ssm.kind == "gdn":
        return q + k + v if ssm.use_short_conv else 0
    return q + k + (v if ssm.use_v_conv else 0)
