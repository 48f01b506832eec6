"""How many floating-point operations training takes, and what devices can do: for model FLOP utilisation.

Counted are products of matrices, attention over the keys a token sees on average, and the scans; norms, activations and
what is computed again in the backward pass are not. No engine is imported.
"""

from __future__ import annotations

import math

from bmojo_edge.config import Config
from bmojo_edge.parameters import layer_shapes

# Dense bfloat16 TFLOP/s by the vendors' data sheets; the longest name that a device's name holds counts.
PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "L4": 121.0,
    "L40S": 362.0,
    "B200": 2250.0,
}


def peak_flops(device: str) -> float | None:
    """Operations a second of a device by its name, None where it is not known."""
    found = [name for name in PEAK_TFLOPS if name.lower() in device.lower()]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None


def _mean_seen(length: int, near: int, far: int | None) -> float:
    """Keys at distance near <= . < far, on average over the tokens of a document of `length`."""
    far = length if far is None else min(far, length)
    if far <= near:
        return 0.0
    return sum((length - distance) for distance in range(near, far)) / length


def _layer_flops(config: Config, layer: int, length: int) -> float:
    """Of one token in the forward pass of one layer."""
    kind, ssm, experts = config.layer_types[layer], config.ssm_of(layer), config.experts_of(layer)
    flops = 0.0
    for name, shape in layer_shapes(config, layer).items():
        if len(shape) < 2 or name.endswith("A_log"):
            continue
        used = experts.per_token / experts.n if experts is not None and ".experts." in name else 1.0
        again = 2 if kind == "bmojo" and config.tie_kv and config.fading_of(layer) else 1
        twice = again if name in ("mixer.k_proj.weight", "mixer.v_proj.weight") else 1  # of y as well
        flops += 2 * math.prod(shape) * used * twice
    if ssm is not None:
        states = ssm.expand * config.d_model * ssm.d_state if ssm.kind == "mamba" else _matrix_states(config, layer)
        flops += 6 * states  # decay, input, output: a multiplication and an addition each
    seen = 0.0
    if kind == "attention":
        seen = _mean_seen(length, 0, config.attention_window_of(layer))
    elif kind == "bmojo":
        w = config.window
        seen = _mean_seen(length, 0, w) + _mean_seen(length, w, w + config.fading_of(layer))
        kept = config.n_eidetic + config.n_sinks
        seen += sum(min(kept, max(0, i - w + 1)) for i in range(length)) / length
    return flops + 4 * config.n_heads * config.d_head * seen


def _matrix_states(config: Config, layer: int) -> int:
    """Numbers in the state of a head-wise mixer."""
    from bmojo_edge.state import Leaf, leaves, state_spec

    state = state_spec(config).layers[layer]
    own = state.ssm if config.layer_types[layer] == "bmojo" else state
    named = [(name, leaf) for name, leaf in leaves(own) if isinstance(leaf, Leaf) and name != "conv"]
    return sum(math.prod(leaf.shape) for _, leaf in named)


def training_flops_per_token(config: Config, length: int) -> float:
    """Operations of a token, forward and backward (twice the forward), in documents of `length` tokens."""
    layers = sum(_layer_flops(config, i, length) for i in range(len(config.layer_types)))
    return 3 * (layers + 2 * config.vocab_size * config.d_model)
