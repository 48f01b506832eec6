"""Which layers a converted model has: what `window` and its companions make of a Transformer's attention."""

from __future__ import annotations

import dataclasses
from typing import Any

from bmojo_convert.names import ConvertError
from bmojo_edge.config import Config, ConfigError

_SINKS = 4  # what an adapted Transformer needs (docs/model.md section 9)


@dataclasses.dataclass(frozen=True)
class Memories:
    """Sizes asked for; None leaves a size to its default, `window` None leaves the layers as they are."""

    window: int | None = None
    sinks: int | None = None
    fading: int | None = None
    eidetic: int | None = None
    chunk: int | None = None


def adapt(config: Config, memories: Memories, where: str) -> Config:
    """The config with the memories asked for.

    With a window, full attention becomes `bmojo` layers of that window with 4 sinks. A layer that has a sliding window
    of its own and sees no farther stays as it is; one that sees farther becomes a `bmojo` layer too. Where every layer
    has a smaller window than the one asked for, the largest of them is taken: nothing sees farther than in training.
    Raises ConvertError naming the option.
    """
    asked = {name: value for name, value in dataclasses.asdict(memories).items() if value is not None}
    if not asked:
        return config
    try:
        if "bmojo" in config.layer_types:
            return _resize(config, memories)
        if memories.window is None:
            raise ConvertError(f"{next(iter(asked))}: needs a window; without one the layers keep full attention")
        if memories.window < 1:
            raise ConvertError(f"window: must be at least 1, got {memories.window}")
        if config.ssm is not None:
            raise ConvertError(f"window: {where} mixes attention with state-space layers, which is not supported")
        return _windowed(config, memories, memories.window)
    except ConfigError as error:
        raise ConvertError(f"{where}: with the memories asked for: {error}") from None


def _windowed(config: Config, memories: Memories, window: int) -> Config:
    own = [config.attention_window_of(i) for i in range(len(config.layer_types))]
    if all(w is not None for w in own):
        window = min(window, max(w for w in own if w is not None))
    kinds = tuple("bmojo" if w is None or w >= window else "attention" for w in own)
    reaches = [w if kind == "attention" else None for w, kind in zip(own, kinds, strict=True)]
    return config.replace(
        layer_types=kinds,
        attention_window=tuple(reaches) if "attention" in kinds else None,
        window=window,
        n_sinks=_SINKS if memories.sinks is None else memories.sinks,
        n_fading=memories.fading or 0,
        n_eidetic=memories.eidetic or 0,
        chunk=memories.chunk,
    )


def _resize(config: Config, memories: Memories) -> Config:
    """A model that has `bmojo` layers keeps what is not asked for; a chunk that no longer fits is shortened."""
    sizes: dict[str, Any] = {
        "window": memories.window,
        "n_sinks": memories.sinks,
        "n_fading": memories.fading,
        "n_eidetic": memories.eidetic,
        "chunk": memories.chunk,
    }
    sizes = {name: value for name, value in sizes.items() if value is not None}
    if "window" in sizes:
        sizes.setdefault("chunk", min(config.chunk_size, sizes["window"]))
    return config.replace(**sizes)
