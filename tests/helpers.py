"""What tests of the oracle and of both twins share: odd configurations, random weights, and how nearness is judged.

Errors are judged as the RMS of the difference over the RMS of the float64 oracle, per dtype, never by a loose atol.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bmojo_edge.config import Config
from bmojo_edge.parameters import parameter_shapes
from bmojo_edge.state import leaves

# Nothing divides anything here: window 8, chunks of 3, 5 eidetic slots, 2 sinks, 3 fading tokens beyond the window.
ODD: dict[str, Any] = {
    "vocab_size": 37,
    "d_model": 20,
    "d_ff": 28,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 6,
    "window": 8,
    "chunk": 3,
    "n_eidetic": 5,
    "n_sinks": 2,
    "n_fading": 3,
    "rope_theta": 100.0,
    "ssm": {"kind": "mamba", "d_state": 5, "d_conv": 4, "expand": 2, "dt_rank": 3},
}


def odd(*layer_types: str, **overrides: Any) -> Config:
    """A small configuration of odd sizes; `ssm=None` leaves a windowed Transformer."""
    fields = {**ODD, "layer_types": layer_types or ("bmojo", "bmojo"), **overrides}
    if fields["ssm"] is None:
        fields["n_fading"] = 0
    return Config(**fields)


# Every memory on and off, every special case of docs/model.md section 5.
GRID: dict[str, Config] = {
    "all": odd(),
    "no rope": odd(rope_theta=None),
    "no fading": odd(n_fading=0),
    "fading as long as the window": odd(n_fading=8),
    "fading of one": odd(n_fading=1),
    "no eidetic": odd(n_eidetic=0),
    "no sinks": odd(n_sinks=0),
    "ring alone": odd(n_eidetic=0, n_sinks=0, n_fading=0),
    "no ssm": odd(ssm=None),
    "no ssm, no rope": odd(ssm=None, rope_theta=None, n_sinks=0),
    "sliding window": odd(ssm=None, n_eidetic=0, n_sinks=0),
    "untied, qk-norm, bias": odd(tie_kv=False, qk_norm=True, attention_bias=True),
    "untied, no rope": odd(tie_kv=False, rope_theta=None),
    "qk-norm": odd(qk_norm=True, tie_embeddings=True),
    "one kv head": odd(n_kv_heads=1),
    "no groups": odd(n_kv_heads=4, d_ff=0),
    "chunk of one": odd(chunk=1),
    "chunk is window": odd(chunk=8),
    "window of one": odd(window=1, chunk=1, n_fading=2),
    "many sinks": odd(n_sinks=11),
    "l2 of the input": odd(innovation={"error": "l2", "signal": "input", "taps": 2}),
    "norms in the ssm": odd(ssm={**ODD["ssm"], "dt_bc_norm": True, "d_conv": 2}),
    "conv of one": odd(ssm={**ODD["ssm"], "d_conv": 1, "dt_rank": None}),
    "yarn": odd(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    "attention": odd("attention", "attention", ssm=None),
    "attention, window of 5": odd("attention", "attention", ssm=None, attention_window=5, rope_theta=None),
    "mamba": odd("mamba", "mamba", rope_theta=None),
    "mixed": odd("bmojo", "attention", "mamba", "attention", attention_window=(None, 5, None, None)),
    "an ssm in one layer": odd("bmojo", "bmojo", "mamba", ssm_layers=(1,)),
    "an ssm in one layer, untied": odd("bmojo", "bmojo", ssm_layers=(0,), tie_kv=False, n_eidetic=0),
    "an ssm beside the memories": odd("mamba", "bmojo", ssm_layers=(), n_fading=0),
    "experts": odd("mamba", "bmojo", experts={"n": 4, "per_token": 2, "layers": [1]}),
}


def random_weights(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights, float32, at which every memory matters: unit embeddings, linears of gain 1, norms around 1."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise, last = rng.standard_normal(shape), name.rsplit(".", 1)[-1]
        if name == "embed.weight":
            return noise
        if name.endswith("norm.weight") or last == "D":
            return 1 + 0.1 * noise
        if last == "A_log":
            return np.log(np.arange(1, shape[-1] + 1)) + 0.1 * noise
        if name.endswith(("dt_proj.bias", "dt_bias")):
            return -2 + 0.1 * noise  # steps of about 0.13, so that the state remembers some tens of tokens
        if last == "bias":
            return 0.1 * noise
        return noise / np.sqrt(shape[-1])

    return {name: draw(name, shape).astype(np.float32) for name, shape in parameter_shapes(config).items()}


def random_tokens(config: Config, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Token ids (batch, length) int64."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))


def to_numpy(x: Any) -> np.ndarray:
    """An array of any engine as float64, or as int64 where it holds integers."""
    if hasattr(x, "detach"):  # torch, whose bfloat16 NumPy cannot take
        x = x.detach().cpu()
        x = x.double() if x.is_floating_point() else x
    elif "bfloat16" in str(getattr(x, "dtype", "")) and hasattr(x, "astype") and not isinstance(x, np.ndarray):
        import mlx.core as mx

        x = x.astype(mx.float32)
    x = np.asarray(x)
    return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)


def rms_ratio(got: Any, ref: Any) -> float:
    """RMS of got - ref over RMS of ref; infinite where got holds a NaN. A reference of zeros demands zeros."""
    got, ref = to_numpy(got), to_numpy(ref)
    assert got.shape == ref.shape, f"shapes differ: got {got.shape}, reference {ref.shape}"
    if not ref.size:
        return 0.0
    error, size = np.sqrt(np.mean((got - ref) ** 2)), np.sqrt(np.mean(ref**2))
    if np.isnan(error):
        return float("inf")
    return float(error / size) if size else float(error)


def assert_close(got: Any, ref: Any, bound: float, what: str = "") -> None:
    """RMS-error ratio within `bound`."""
    ratio = rms_ratio(got, ref)
    assert ratio <= bound, f"{what}: RMS-error ratio {ratio:.2e} exceeds {bound:.0e}"


def assert_states_close(got: Any, ref: Any, bound: float) -> None:
    """Every leaf of two states: the same names and shapes, equal integers, floats within `bound`."""
    got_leaves, ref_leaves = dict(leaves(got)), dict(leaves(ref))
    assert list(got_leaves) == list(ref_leaves)
    for name, want in ref_leaves.items():
        have, want = to_numpy(got_leaves[name]), to_numpy(want)
        assert have.dtype == want.dtype, name
        if want.dtype == np.int64:
            np.testing.assert_array_equal(have, want, err_msg=name)
        else:
            assert_close(have, want, bound, name)


def assert_states_equal(got: Any, ref: Any) -> None:
    """Every leaf of two states, bit for bit."""
    got_leaves, ref_leaves = dict(leaves(got)), dict(leaves(ref))
    assert list(got_leaves) == list(ref_leaves)
    for name, want in ref_leaves.items():
        np.testing.assert_array_equal(to_numpy(got_leaves[name]), to_numpy(want), err_msg=name)


def take_row(state: Any, row: int) -> Any:
    """One row of a batched state, as a batch of one."""
    from bmojo_edge.state import map_leaves

    return map_leaves(lambda x: x[row : row + 1], state)


def rounded(weights: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Weights rounded to a dtype's values and kept as float32, so that a test measures arithmetic and not storage."""
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return {name: w.astype(kind).astype(np.float32) for name, w in weights.items()}


def as_stored(weights: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Weights as a checkpoint of `dtype` holds them: what the scan is made of stays float32."""
    kept = {name: w for name, w in weights.items() if name.endswith((".A_log", ".D", ".dt_proj.bias"))}
    return rounded(weights, dtype) | kept
