"""The table of names: which tensors of a foreign checkpoint make which parameter of ours, and how.

Every converter is a loop over these rows. A parameter without its tensor, a tensor no row asks for and a wrong shape
are errors that name it. Knows names and layouts, not files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from bmojo_edge.config import Config
from bmojo_edge.parameters import parameter_shapes
from bmojo_edge.tensors import FLOATS, CheckpointError


class ConvertError(CheckpointError):
    """A checkpoint cannot be converted; the message names the file and the field, tensor or option."""


class Layout(Protocol):
    """How a stored array becomes a parameter: `(array, config) -> array`."""

    def __call__(self, array: np.ndarray, config: Config, /) -> np.ndarray: ...


def _interleaved(heads: Callable[[Config], int]) -> Layout:
    """Undo GGUF's llama order, where rotary pairs (j, j + p/2) of each head are neighbours, for q or k rows."""

    def undo(array: np.ndarray, config: Config) -> np.ndarray:
        n = heads(config)
        pairs = array.reshape(n, len(array) // n // 2, 2, *array.shape[1:])  # (heads, p/2, 2, ...)
        return pairs.swapaxes(1, 2).reshape(array.shape)

    return undo


class Row(NamedTuple):
    """One parameter: our name, theirs, and its layout where it is not simply the same array."""

    ours: str
    theirs: str
    layout: Layout | None = None


class Table(NamedTuple):
    """All rows of a format; `{i}` stands for a layer. `ignored` are patterns of tensors that hold nothing to keep."""

    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()


_TRANSFORMER = (
    # ours, Hugging Face, GGUF
    ("embed.weight", "model.embed_tokens.weight", "token_embd.weight"),
    ("norm.weight", "model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "lm_head.weight", "output.weight"),
    ("layers.{i}.norm.weight", "model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight"),
    ("layers.{i}.mlp_norm.weight", "model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    ("layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight"),
    ("layers.{i}.mlp.up_proj.weight", "model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight"),
    ("layers.{i}.mlp.down_proj.weight", "model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight"),
    ("layers.{i}.mixer.q_proj.weight", "model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight"),
    ("layers.{i}.mixer.k_proj.weight", "model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight"),
    ("layers.{i}.mixer.v_proj.weight", "model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight"),
    ("layers.{i}.mixer.o_proj.weight", "model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight"),
    ("layers.{i}.mixer.q_proj.bias", "model.layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias"),
    ("layers.{i}.mixer.k_proj.bias", "model.layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias"),
    ("layers.{i}.mixer.v_proj.bias", "model.layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias"),
    ("layers.{i}.mixer.q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight"),
    ("layers.{i}.mixer.k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight"),
)

# Old checkpoints keep the rotary frequencies as a tensor; they follow from the config.
_HF_IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

HF_TRANSFORMER = Table(tuple(Row(ours, hf) for ours, hf, _ in _TRANSFORMER), _HF_IGNORED)

# Frequency factors are read into rope_scaling, see gguf.py.
_GGUF_IGNORED = (r"rope_freqs\.weight",)

GGUF_TRANSFORMER = Table(tuple(Row(ours, gguf) for ours, _, gguf in _TRANSFORMER), _GGUF_IGNORED)

_ROTATED = {
    "q_proj": _interleaved(lambda config: config.n_heads),
    "k_proj": _interleaved(lambda config: config.kv_heads),
}

GGUF_LLAMA = Table(
    tuple(row._replace(layout=_ROTATED.get(row.ours.split(".")[-2])) for row in GGUF_TRANSFORMER.rows), _GGUF_IGNORED
)


def own_names(config: Config) -> Table:
    """The table of a source that has our names already."""
    names = dict.fromkeys(re.sub(r"^layers\.\d+\.", "layers.{i}.", name) for name in parameter_shapes(config))
    return Table(tuple(Row(name, name) for name in names))


class Stored(NamedTuple):
    """Tensors of a source by their own names: shapes, known at once, and how to read one."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


class Renamed(Mapping[str, np.ndarray]):
    """The parameters of a config, each made from a source's tensors when it is asked for.

    where: what to call the source in messages. Raises ConvertError for a tensor missing, left over or misshapen.
    """

    def __init__(self, config: Config, table: Table, stored: Stored, where: str) -> None:
        self._config, self._stored, self._where = config, stored, where
        self._shapes = parameter_shapes(config)
        rows = {row.ours: row for row in table.rows}
        self._rows: dict[str, Row] = {}
        for name, shape in self._shapes.items():
            layer = re.match(r"layers\.(\d+)\.", name)
            row = rows.get(name if layer is None else f"layers.{{i}}.{name[layer.end() :]}")
            if row is None:
                raise ConvertError(f"{where}: this format has no tensor for {name!r}")
            if layer is not None:
                row = row._replace(theirs=row.theirs.replace("{i}", layer[1]))
            self._rows[name] = row
            found = stored.shapes.get(row.theirs)
            if found is None:
                raise ConvertError(f"{where}: tensor {row.theirs!r} is missing")
            if math.prod(found) != math.prod(shape) or (row.layout is None and found != shape):
                raise ConvertError(f"{where}: tensor {row.theirs!r} has shape {found}, expected {shape}")
        used = {row.theirs for row in self._rows.values()}
        ignored = re.compile("|".join(table.ignored) or "(?!)")
        extra = sorted(name for name in stored.shapes if name not in used and not ignored.fullmatch(name))
        if extra:
            raise ConvertError(f"{where}: {len(extra)} tensor(s) left over, such as {extra[0]!r}")

    def __getitem__(self, name: str) -> np.ndarray:
        row = self._rows[name]
        array = self._stored.read(row.theirs)
        if array.dtype.name not in FLOATS:
            raise ConvertError(f"{self._where}: tensor {row.theirs!r} is {array.dtype}, not a floating-point dtype")
        if row.layout is not None:
            array = row.layout(array, self._config)
        if array.shape != self._shapes[name]:
            raise ConvertError(f"{self._where}: {row.theirs!r} gives {array.shape}, expected {self._shapes[name]}")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
