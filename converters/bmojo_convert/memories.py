"""Which layers a converted model has: what `window` and its companions make of attention."""

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

    With a window, full attention becomes `bmojo` layers of that window with 4 sinks and no SSM; state-space layers stay
    as they are. A layer that has a sliding window of its own and sees no farther stays too; one that sees farther
    becomes a `bmojo` layer. Where every layer has a smaller window than the one asked for, the largest of them is
    taken: nothing sees farther than in training. All `bmojo` layers of a model have one window and the same sinks,
    those that the source had included. Raises ConvertError naming the option.
    """
    asked = {name: value for name, value in dataclasses.asdict(memories).items() if value is not None}
    if not asked:
        return config
    try:
        if memories.window is not None and memories.window < 1:
            raise ConvertError(f"window: must be at least 1, got {memories.window}")
        if "bmojo" not in config.layer_types:
            if memories.window is None:
                raise ConvertError(f"{next(iter(asked))}: needs a window; without one the layers keep full attention")
            if "attention" not in config.layer_types:
                raise ConvertError(f"window: {where} has no attention to give a window: its memory is constant already")
        elif memories.window is None or "attention" not in config.layer_types:
            return _resize(config, memories)
        return _windowed(config, memories, memories.window)
    except ConfigError as error:
        raise ConvertError(f"{where}: with the memories asked for: {error}") from None


def _windowed(config: Config, memories: Memories, window: int) -> Config:
    layers = range(len(config.layer_types))
    own = {i: config.attention_window_of(i) for i in layers if config.layer_types[i] == "attention"}
    reaches = [w for w in own.values() if w is not None]
    has_memories = "bmojo" in config.layer_types
    if len(reaches) == len(own) and not has_memories:
        window = min(window, max(reaches))
    kept = {i: w for i, w in own.items() if w is not None and w < window}
    changed = own.keys() - kept.keys()
    if not changed:
        return _resize(config, memories)
    fading = tuple(i for i in layers if config.layer_types[i] == "bmojo" and config.ssm_of(i) is not None)
    # Sizes of memories that no layer had mean nothing.
    sinks, eidetic, chunk = _SINKS, 0, None
    if has_memories:
        sinks, eidetic, chunk = config.n_sinks or _SINKS, config.n_eidetic, min(config.chunk_size, window)
    return config.replace(
        layer_types=tuple("bmojo" if i in changed else kind for i, kind in enumerate(config.layer_types)),
        attention_window=tuple(kept.get(i) for i in layers) if kept else None,
        ssm_layers=None if config.ssm is None else fading,
        window=window,
        n_sinks=sinks if memories.sinks is None else memories.sinks,
        n_fading=(config.fading if fading else 0) if memories.fading is None else memories.fading,
        n_eidetic=eidetic if memories.eidetic is None else memories.eidetic,
        chunk=chunk if memories.chunk is None else memories.chunk,
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
