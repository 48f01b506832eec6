"""Which known model a configuration is: Transformers, Mamba and hybrids are special cases (docs/model.md section 5).

It looks at a configuration only. Whether a window is long enough to be full attention depends on the text, not on it.
"""

from __future__ import annotations

from collections import Counter

from bmojo_edge.config import Config

_SSM_NAMES = {"mamba": "Mamba", "mamba2": "Mamba-2", "gdn": "gated DeltaNet", "gka": "gated KalmaNet"}


def special_case(config: Config) -> str:
    """The name of the model a configuration describes, such as "Mamba", "B'MOJO" or "sliding-window Transformer"."""
    counts = Counter(_layer_case(config, i) for i in range(len(config.layer_types)))
    if len(counts) == 1:
        return next(iter(counts))
    return "hybrid of " + ", ".join(f"{n} {name} layer{'s' * (n > 1)}" for name, n in counts.items())


def _layer_case(config: Config, layer: int) -> str:
    kind = config.layer_types[layer]
    if kind == "attention":
        return "Transformer" if config.attention_window_of(layer) is None else "sliding-window Transformer"
    if kind != "bmojo":
        return _SSM_NAMES[kind]
    extras = ["sinks"] if config.n_sinks else []
    if config.ssm_of(layer) is None or (not config.fading and not config.n_eidetic):  # then nothing reads the SSM
        name = "sliding-window Transformer"
        extras += ["eidetic memory"] if config.n_eidetic else []
    elif not config.n_eidetic:
        name = "B'MOJO-F"
    else:
        name = "B'MOJO" if config.fading else "B'MOJO without fading tokens"
    return f"{name} with {' and '.join(extras)}" if extras else name
