"""The configuration of a model: one frozen dataclass, its presets, its JSON, its sizes.

It knows every hyper-parameter of a B'MOJO model and nothing of arrays: no framework is imported here.
Field names are those of docs/model.md; `config.json` holds the same names, flat but for the nested tables.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

_T = TypeVar("_T")

SSM_KINDS = ("mamba",)
LAYER_TYPES = ("bmojo", "attention", *SSM_KINDS)
DTYPES = ("float32", "float16", "bfloat16")
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Keys other programs put in a config.json beside ours; they never change what is computed.
_FOREIGN_KEYS = {
    "model_type", "architectures", "transformers_version", "torch_dtype", "model_file", "bos_token_id", "eos_token_id",
    "pad_token_id", "use_cache", "max_position_embeddings", "quantization_config", "_name_or_path",
}  # fmt: skip


class ConfigError(ValueError):
    """A field of a configuration is missing, unknown or out of range; the message names it."""


def _fail(field: str, message: str) -> None:
    raise ConfigError(f"{field}: {message}")


def _check_int(field: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        _fail(field, f"must be an integer, got {value!r}")
    elif value < minimum:
        _fail(field, f"must be at least {minimum}, got {value}")


def _check_number(field: str, value: object, above: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _fail(field, f"must be a finite number, got {value!r}")
    elif value <= above:
        _fail(field, f"must be greater than {above}, got {value}")


def _check_bool(field: str, value: object) -> None:
    if not isinstance(value, bool):
        _fail(field, f"must be true or false, got {value!r}")


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        _fail(field, f"must be one of {', '.join(choices)}, got {value!r}")


def _table(cls: type[_T], field: str, value: object) -> _T:
    """A nested table from its dataclass or its mapping; unknown keys are refused by name."""
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{field}: must be a table, got {value!r}")
    names = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in value:
        if key not in names:
            _fail(f"{field}.{key}", f"is not a known field; known are {', '.join(sorted(names))}")
    return cls(**value)


@dataclass(frozen=True, slots=True)
class SSM:
    """The state-space mixer of a layer (docs/model.md section 4). `dt_rank` None means ceil(d_model / 16)."""

    kind: str = "mamba"
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    dt_bc_norm: bool = False  # RMSNorm on dt, B and C, as Jamba has it

    def __post_init__(self) -> None:
        _check_choice("ssm.kind", self.kind, SSM_KINDS)
        _check_int("ssm.d_state", self.d_state, 1)
        _check_int("ssm.d_conv", self.d_conv, 1)
        _check_int("ssm.expand", self.expand, 1)
        if self.dt_rank is not None:
            _check_int("ssm.dt_rank", self.dt_rank, 1)
        _check_bool("ssm.dt_bc_norm", self.dt_bc_norm)


@dataclass(frozen=True, slots=True)
class Innovation:
    """How unpredictability is scored (docs/model.md section 3, step 5)."""

    signal: str | None = None  # None: ssm_output where there is an SSM, input where there is none
    error: str = "relative"
    taps: int = 4

    def __post_init__(self) -> None:
        if self.signal is not None:
            _check_choice("innovation.signal", self.signal, ("ssm_output", "input"))
        _check_choice("innovation.error", self.error, ("relative", "l2"))
        _check_int("innovation.taps", self.taps, 1)

    def coefficients(self) -> list[float]:
        """c_1 .. c_taps: geometric with ratio 1/2, summing to 1; c_1 weighs the latest value."""
        weights = [0.5**j for j in range(self.taps)]
        return [w / sum(weights) for w in weights]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context; the fields are those of transformers."""

    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_choice("rope_scaling.rope_type", self.rope_type, ROPE_TYPES)
        _check_number("rope_scaling.factor", self.factor, 0.0)
        needed: tuple[str, ...] = ()
        if self.rope_type == "llama3":
            needed = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        elif self.rope_type == "yarn":
            needed = ("original_max_position_embeddings",)
        for name in needed:
            if getattr(self, name) is None:
                _fail(f"rope_scaling.{name}", f"is required by rope_type {self.rope_type!r}")


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in place of the MLP: `n` experts, `per_token` used, in the layers listed."""

    n: int
    per_token: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_int("experts.n", self.n, 1)
        _check_int("experts.per_token", self.per_token, 1)
        if self.per_token > self.n:
            _fail("experts.per_token", f"must be at most experts.n ({self.n}), got {self.per_token}")
        object.__setattr__(self, "layers", tuple(self.layers))


@dataclass(frozen=True, slots=True)
class Quantization:
    """The `quantization` block mlx-lm writes: affine groups along a weight's rows."""

    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 5, 6, 8):
            _fail("quantization.bits", f"must be one of 2, 3, 4, 5, 6, 8, got {self.bits!r}")
        if self.group_size not in (32, 64, 128):
            _fail("quantization.group_size", f"must be one of 32, 64, 128, got {self.group_size!r}")
        _check_choice("quantization.mode", self.mode, ("affine",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A model's configuration. Fields left None get the default named beside them and are concrete afterwards.

    Tables (`ssm`, `innovation`, `rope_scaling`, `experts`, `quantization`) may be given as mappings.
    Raises ConfigError naming the field that is wrong.
    """

    vocab_size: int
    d_model: int
    layer_types: tuple[str, ...]
    n_layers: int | None = None  # len(layer_types); accepted for readability, must agree
    d_ff: int = 0  # 0: no MLP after the mixers
    n_heads: int = 1
    n_kv_heads: int | None = None  # n_heads
    head_dim: int | None = None  # d_model / n_heads
    window: int = 512
    n_fading: int | None = None  # window where there is an SSM, else 0
    n_eidetic: int = 0
    n_sinks: int = 0
    chunk: int | None = None  # min(64, window)
    attention_window: int | tuple[int | None, ...] | None = None  # of `attention` layers; None: full attention
    rope_theta: float | None = None  # None: no positional encoding
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = False
    attention_bias: bool = False  # on q, k and v
    tie_kv: bool = True
    tie_embeddings: bool = False
    dtype: str = "float32"
    ssm: SSM | None = None
    innovation: Innovation = dataclasses.field(default_factory=Innovation)
    experts: Experts | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layer_types, str) or not isinstance(self.layer_types, tuple | list) or not self.layer_types:
            _fail("layer_types", f"must be a list with one entry per layer, got {self.layer_types!r}")
        self._set(layer_types=tuple(self.layer_types))
        for i, kind in enumerate(self.layer_types):
            _check_choice(f"layer_types[{i}]", kind, LAYER_TYPES)
        if self.n_layers is not None and self.n_layers != len(self.layer_types):
            _fail("n_layers", f"is {self.n_layers!r} but layer_types has {len(self.layer_types)} entries")
        self._set(n_layers=len(self.layer_types))
        self._resolve_tables()
        self._check_widths()
        self._check_attention_window()
        self._check_memories()
        for name in ("qk_norm", "attention_bias", "tie_kv", "tie_embeddings"):
            _check_bool(name, getattr(self, name))
        _check_number("norm_eps", self.norm_eps, 0.0)
        _check_choice("dtype", self.dtype, DTYPES)

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _resolve_tables(self) -> None:
        optional = {"rope_scaling": RopeScaling, "experts": Experts, "quantization": Quantization, "ssm": SSM}
        for name, cls in optional.items():
            if getattr(self, name) is not None:
                self._set(**{name: _table(cls, name, getattr(self, name))})
        self._set(innovation=_table(Innovation, "innovation", {} if self.innovation is None else self.innovation))
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "default":
            self._set(rope_scaling=None)
        if self.ssm is None:
            named = [kind for kind in self.layer_types if kind in SSM_KINDS]
            if named:
                self._set(ssm=SSM(kind=named[0]))
        if self.ssm is not None and self.ssm.dt_rank is None and isinstance(self.d_model, int):
            self._set(ssm=dataclasses.replace(self.ssm, dt_rank=math.ceil(self.d_model / 16)))
        for i in self.experts.layers if self.experts else ():
            _check_int("experts.layers", i, 0)
            if i >= len(self.layer_types):
                _fail("experts.layers", f"names layer {i} but there are {len(self.layer_types)}")

    def _check_widths(self) -> None:
        for name in ("vocab_size", "d_model", "n_heads"):
            _check_int(name, getattr(self, name), 1)
        _check_int("d_ff", self.d_ff, 0)
        if self.n_kv_heads is None:
            self._set(n_kv_heads=self.n_heads)
        _check_int("n_kv_heads", self.n_kv_heads, 1)
        if self.n_heads % self.kv_heads:
            _fail("n_kv_heads", f"must divide n_heads ({self.n_heads}), got {self.n_kv_heads}")
        if self.head_dim is None:
            if self.d_model % self.n_heads:
                _fail("head_dim", f"must be given: n_heads ({self.n_heads}) does not divide d_model ({self.d_model})")
            self._set(head_dim=self.d_model // self.n_heads)
        _check_int("head_dim", self.head_dim, 1)
        if self.rope_theta is not None:
            _check_number("rope_theta", self.rope_theta, 0.0)
            if self.d_head % 2:
                _fail("head_dim", f"must be even where rope_theta is set, got {self.head_dim}")
        elif self.rope_scaling is not None:
            _fail("rope_scaling", "is set but rope_theta is null (no positions to scale)")

    def _check_attention_window(self) -> None:
        given = self.attention_window
        if isinstance(given, list | tuple):
            self._set(attention_window=tuple(given))
            if len(given) != len(self.layer_types):
                _fail("attention_window", f"lists {len(given)} layers but there are {len(self.layer_types)}")
        for w in given if isinstance(given, list | tuple) else [given]:
            if w is not None:
                _check_int("attention_window", w, 1)

    def _check_memories(self) -> None:
        _check_int("window", self.window, 1)
        _check_int("n_eidetic", self.n_eidetic, 0)
        _check_int("n_sinks", self.n_sinks, 0)
        if self.chunk is None:
            self._set(chunk=min(64, self.window))
        _check_int("chunk", self.chunk, 1)
        if self.chunk_size > self.window:
            _fail("chunk", f"must be at most window ({self.window}), got {self.chunk}")
        if self.n_fading is None:
            self._set(n_fading=self.window if self.ssm else 0)
        _check_int("n_fading", self.n_fading, 0)
        if self.ssm is None:
            if self.n_fading:
                _fail("n_fading", f"must be 0 where ssm is null (there is nothing to fade), got {self.n_fading}")
            if self.innovation.signal == "ssm_output":
                _fail("innovation.signal", "is 'ssm_output' but ssm is null; use 'input' or null")

    # Concrete views of fields that may be left None when constructing.
    @property
    def kv_heads(self) -> int:
        """n_kv_heads."""
        assert self.n_kv_heads is not None
        return self.n_kv_heads

    @property
    def d_head(self) -> int:
        """head_dim."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def chunk_size(self) -> int:
        """chunk."""
        assert self.chunk is not None
        return self.chunk

    @property
    def fading(self) -> int:
        """n_fading."""
        assert self.n_fading is not None
        return self.n_fading

    def ssm_of(self, layer: int) -> SSM | None:
        """The SSM of a layer: `ssm` in a bmojo layer, `ssm` with the layer's own kind where its type names one."""
        kind = self.layer_types[layer]
        if kind == "attention":
            return None
        if kind == "bmojo" or self.ssm is None:
            return self.ssm
        return dataclasses.replace(self.ssm, kind=kind)

    def attention_window_of(self, layer: int) -> int | None:
        """How far an `attention` layer sees; None is full attention with a growing cache."""
        w = self.attention_window
        return w[layer] if isinstance(w, tuple) else w

    def signal_of(self, layer: int) -> str:
        """What a bmojo layer's innovation predicts: 'ssm_output' or 'input'."""
        return self.innovation.signal or ("ssm_output" if self.ssm_of(layer) else "input")

    def experts_of(self, layer: int) -> Experts | None:
        """The mixture of experts of a layer, None where its MLP is dense."""
        return self.experts if self.experts and layer in self.experts.layers else None

    @property
    def growing_layers(self) -> tuple[int, ...]:
        """Layers whose cache grows with the sequence: full attention."""
        kinds = enumerate(self.layer_types)
        return tuple(i for i, kind in kinds if kind == "attention" and self.attention_window_of(i) is None)

    def state_bytes(self, batch: int = 1, tokens: int = 0) -> int:
        """Bytes of the decoding state of `batch` sequences; `tokens` counts only for full-attention layers."""
        from bmojo_edge.state import spec_bytes, state_spec

        return spec_bytes(state_spec(self, batch, tokens))

    def replace(self, **overrides: Any) -> Self:
        """A copy with fields changed. Derived defaults stay as they are; name those that should follow."""
        if "layer_types" in overrides:
            overrides.setdefault("n_layers", None)
        return dataclasses.replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, with `model_type`."""
        return {"model_type": "bmojo", **json.loads(json.dumps(dataclasses.asdict(self)))}

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> Self:
        """From the text of a config.json, its path, or its parsed mapping. Unknown fields are refused by name."""
        if isinstance(source, Path):
            source = source.read_text(encoding="utf-8")
        if isinstance(source, str):
            try:
                source = json.loads(source)
            except json.JSONDecodeError as error:
                raise ConfigError(f"config.json: not valid JSON ({error})") from None
        if not isinstance(source, Mapping):
            raise ConfigError(f"config.json: must be an object, got {type(source).__name__}")
        if source.get("model_type", "bmojo") != "bmojo":
            raise ConfigError(f"model_type: is {source['model_type']!r}, not 'bmojo'; run `bmojo-edge convert` on it")
        names = {f.name for f in dataclasses.fields(cls)}
        for key in source:
            if key not in names and key not in _FOREIGN_KEYS:
                _fail(key, "is not a known field of a bmojo config")
        for key in ("vocab_size", "d_model", "layer_types"):
            if key not in source:
                _fail(key, "is missing")
        return cls(**{key: value for key, value in source.items() if key in names})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """A named configuration with any field overridden; `ssm` and `innovation` tables merge, `ssm=None` removes it.

        `n_layers` alone repeats the preset's layer type.
        """
        from bmojo_edge.presets import PRESETS

        if name not in PRESETS:
            raise ConfigError(f"preset: {name!r} is not one of {', '.join(PRESETS)}")
        fields = dict(PRESETS[name])
        names = {f.name for f in dataclasses.fields(cls)}
        for key, value in overrides.items():
            if key not in names:
                _fail(key, "is not a known field of a bmojo config")
            base = fields.get(key)
            merges = key in ("ssm", "innovation") and isinstance(base, Mapping) and isinstance(value, Mapping)
            fields[key] = {**base, **value} if merges and base is not None else value
        if overrides.get("n_layers") is not None and "layer_types" not in overrides:
            _check_int("n_layers", overrides["n_layers"], 1)
            fields["layer_types"] = (fields["layer_types"][0],) * overrides["n_layers"]
        return cls(**fields)
