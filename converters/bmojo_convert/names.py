"""The table of names: which tensors of a foreign checkpoint make which parameter of ours, and how.

Every converter is a loop over these rows. A parameter without its tensor, a tensor no row asks for and a wrong shape
are errors that name it. Knows names and layouts, not files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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


def _taps(array: np.ndarray, config: Config) -> np.ndarray:
    """A depthwise convolution without its axis of length 1: (c, 1, k) in PyTorch, (c, k, 1) in MLX."""
    axes = [axis for axis in (1, 2) if array.ndim == 3 and array.shape[axis] == 1]
    return array.squeeze(axes[0]) if axes else array


class Row(NamedTuple):
    """One parameter: our name, theirs, and its layout where it is not simply the same array.

    `{i}` stands for a layer, other names in braces in `theirs` for parts of the layer that `Table.places` names. With
    `{e}` there is a tensor for every expert, and the parameter is all of them stacked.
    """

    ours: str
    theirs: str
    layout: Layout | None = None


class Table(NamedTuple):
    """All rows of a format; `ignored` are patterns of tensors that hold nothing to keep."""

    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()
    places: Callable[[Config, int], Mapping[str, str]] = lambda config, layer: {}


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

# --- state-space mixers ---------------------------------------------------------------------------------------------

_MAMBA = (
    # ours, Hugging Face; mamba and mamba2 name the same things alike
    ("in_proj.weight", "in_proj.weight"),
    ("conv.weight", "conv1d.weight"),
    ("conv.bias", "conv1d.bias"),
    ("A_log", "A_log"),
    ("D", "D"),
    ("out_proj.weight", "out_proj.weight"),
)
_MAMBA_BIASES = (("in_proj.bias", "in_proj.bias"), ("out_proj.bias", "out_proj.bias"))
_MAMBA1 = (
    *_MAMBA,
    *_MAMBA_BIASES,
    ("x_proj.weight", "x_proj.weight"),
    ("dt_proj.weight", "dt_proj.weight"),
    ("dt_proj.bias", "dt_proj.bias"),
)
_MAMBA2 = (*_MAMBA, ("dt_bias", "dt_bias"), ("norm.weight", "norm.weight"))
_JAMBA_NORMS = (
    ("dt_norm.weight", "dt_layernorm.weight"),
    ("B_norm.weight", "b_layernorm.weight"),
    ("C_norm.weight", "c_layernorm.weight"),
)


def _under(ours: str, theirs: str, names: Iterable[tuple[str, str]]) -> tuple[Row, ...]:
    """Rows of one module: both sides' names behind their prefixes, convolutions without their empty axis."""
    return tuple(Row(ours + a, theirs + b, _taps if a.endswith("conv.weight") else None) for a, b in names)


_BACKBONE = (
    Row("embed.weight", "backbone.embeddings.weight"),
    Row("norm.weight", "backbone.norm_f.weight"),
    Row("lm_head.weight", "lm_head.weight"),
    Row("layers.{i}.norm.weight", "backbone.layers.{i}.norm.weight"),
)
HF_MAMBA = Table(_BACKBONE + _under("layers.{i}.mixer.", "backbone.layers.{i}.mixer.", _MAMBA1))
HF_MAMBA2 = Table(_BACKBONE + _under("layers.{i}.mixer.", "backbone.layers.{i}.mixer.", _MAMBA2 + _MAMBA_BIASES))

_JAMBA = {"norm.weight": "model.final_layernorm.weight"} | {
    "layers.{i}.mlp_norm.weight": "model.layers.{i}.pre_ff_layernorm.weight"
}
HF_JAMBA = Table(
    tuple(
        row._replace(theirs=_JAMBA.get(row.ours, row.theirs.replace(".mlp.", ".feed_forward.")))
        for row in HF_TRANSFORMER.rows
        if not row.ours.endswith(("proj.bias", "q_norm.weight", "k_norm.weight"))
    )
    + _under("layers.{i}.mixer.", "model.layers.{i}.mamba.", _MAMBA1 + _JAMBA_NORMS)
    + (Row("layers.{i}.mlp.router.weight", "model.layers.{i}.feed_forward.router.weight"),)
    + tuple(
        Row(
            f"layers.{{i}}.mlp.experts.{x}_proj.weight",
            f"model.layers.{{i}}.feed_forward.experts.{{e}}.{x}_proj.weight",
        )
        for x in ("gate", "up", "down")
    )
)

# --- Hybrid Model Factory: a hybrid of a Transformer, whose names the rest of the layer keeps -----------------------

_PROJECTIONS = tuple(
    (f"{x}_{part}", f"{x}_{part.replace('.', '{_}.')}")
    for x, part in (
        ("q", "proj.weight"), ("k", "proj.weight"), ("v", "proj.weight"), ("q", "proj.bias"), ("k", "proj.bias"),
        ("v", "proj.bias"), ("q", "norm.weight"), ("k", "norm.weight"),
    )
)  # fmt: skip
_DELTA = (
    *((f"{x}_conv.{leaf}", f"{x}_conv1d.{leaf}") for x in "qkv" for leaf in ("weight", "bias")),
    *((name, name) for name in ("b_proj.weight", "b_proj.bias", "gk_proj.weight", "a_proj.weight", "g_proj.weight")),
    *((name, name) for name in ("alpha_proj.weight", "alpha_proj.bias", "o_norm.weight", "k_rep", "v_rep")),
    *((f"proj_{x}.linear{y}.weight", f"proj_{x}.linear{y}.weight") for x in "kv" for y in "AB"),
)
_B_C_NORMS = (("B_norm.weight", "B_norm.weight"), ("C_norm.weight", "C_norm.weight"))
_ATTENDING = tuple((ours, theirs.format(_="")) for ours, theirs in _PROJECTIONS) + (("o_proj.weight", "o_proj.weight"),)
_FADING = tuple((f"fading.{ours}", theirs.format(_="_")) for ours, theirs in _PROJECTIONS)
_DELTA_ALONE = tuple(pair for pair in _ATTENDING if pair[0] in ("q_proj.weight", "k_proj.weight", "v_proj.weight"))

# {mixer} and {ssm} are the modules of a layer's mixer and of the SSM within it, see hmf.py.
HMF = Table(
    tuple(row for row in HF_TRANSFORMER.rows if ".mixer." not in row.ours)
    + _under("layers.{i}.mixer.", "model.layers.{i}.{mixer}.", _ATTENDING + _FADING + _MAMBA2 + _B_C_NORMS + _DELTA)
    + _under(
        "layers.{i}.mixer.ssm.",
        "model.layers.{i}.{ssm}.",
        _MAMBA2 + _B_C_NORMS + _DELTA + _DELTA_ALONE + (("o_proj.weight", "o_proj.weight"),),
    ),
    _HF_IGNORED,
)


def own_names(config: Config) -> Table:
    """The table of a source that has our names already."""
    names = dict.fromkeys(re.sub(r"^layers\.\d+\.", "layers.{i}.", name) for name in parameter_shapes(config))
    return Table(tuple(Row(name, name) for name in names))


class Stored(NamedTuple):
    """Tensors of a source by their own names: shapes, known at once, and how to read one."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def _stacked(row: Row) -> bool:
    """Whether a parameter is several tensors, one for every expert."""
    return "{e}" in row.theirs


def _tensors(row: Row, layer: int | None, config: Config, table: Table) -> tuple[str, ...]:
    """Their names of what makes one parameter, in order."""
    if layer is None:
        return (row.theirs,)
    places, experts = table.places(config, layer), config.experts_of(layer)
    count = experts.n if experts is not None and _stacked(row) else 1
    return tuple(row.theirs.format(i=layer, e=e, **places) for e in range(count))


class Renamed(Mapping[str, np.ndarray]):
    """The parameters of a config, each made from a source's tensors when it is asked for.

    where: what to call the source in messages. Raises ConvertError for a tensor missing, left over or misshapen.
    """

    def __init__(self, config: Config, table: Table, stored: Stored, where: str) -> None:
        self._config, self._stored, self._where = config, stored, where
        self._shapes = parameter_shapes(config)
        rows = {row.ours: row for row in table.rows}
        self._rows: dict[str, Row] = {}
        self._theirs: dict[str, tuple[str, ...]] = {}
        for name, shape in self._shapes.items():
            layer = re.match(r"layers\.(\d+)\.", name)
            row = rows.get(name if layer is None else f"layers.{{i}}.{name[layer.end() :]}")
            if row is None:
                raise ConvertError(f"{where}: this format has no tensor for {name!r}")
            self._rows[name] = row
            self._theirs[name] = _tensors(row, None if layer is None else int(layer[1]), config, table)
            for theirs in self._theirs[name]:
                self._check(theirs, shape[1:] if _stacked(row) else shape, row.layout)
        used = {theirs for names in self._theirs.values() for theirs in names}
        ignored = re.compile("|".join(table.ignored) or "(?!)")
        extra = sorted(name for name in stored.shapes if name not in used and not ignored.fullmatch(name))
        if extra:
            raise ConvertError(f"{where}: {len(extra)} tensor(s) left over, such as {extra[0]!r}")

    def _check(self, theirs: str, shape: tuple[int, ...], layout: Layout | None) -> None:
        found = self._stored.shapes.get(theirs)
        if found is None:
            raise ConvertError(f"{self._where}: tensor {theirs!r} is missing")
        if math.prod(found) != math.prod(shape) or (layout is None and found != shape):
            raise ConvertError(f"{self._where}: tensor {theirs!r} has shape {found}, expected {shape}")

    def __getitem__(self, name: str) -> np.ndarray:
        row, parts = self._rows[name], [self._read(theirs) for theirs in self._theirs[name]]
        array = np.stack(parts) if _stacked(row) else parts[0]
        if row.layout is not None:
            array = row.layout(array, self._config)
        if array.shape != self._shapes[name]:
            theirs = self._theirs[name][0]
            raise ConvertError(f"{self._where}: {theirs!r} gives {array.shape}, expected {self._shapes[name]}")
        return array

    def _read(self, theirs: str) -> np.ndarray:
        array = self._stored.read(theirs)
        if array.dtype.name not in FLOATS:
            raise ConvertError(f"{self._where}: tensor {theirs!r} is {array.dtype}, not a floating-point dtype")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
