"""The configuration of a model: one frozen dataclass, its presets, its JSON, its sizes.

It knows every hyper-parameter of a B'MOJO model and nothing of arrays: no framework is imported here.
Field names are those of docs/model.md; `config.json` holds the same names, flat but for the nested tables.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bmojo_edge.checks import ConfigError, check_bool, check_choice, check_int, check_number, fail, table
from bmojo_edge.ssm_config import SSM, SSM_KINDS, fields_of, resolve

__all__ = [
    "DTYPES",
    "SSM",
    "SSM_KINDS",
    "Config",
    "ConfigError",
    "Experts",
    "Innovation",
    "Quantization",
    "RopeScaling",
]

LAYER_TYPES = ("bmojo", "attention", *SSM_KINDS)
DTYPES = ("float32", "float16", "bfloat16")
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Keys other programs put in a config.json beside ours; they never change what is computed.
_FOREIGN_KEYS = {
    "model_type", "architectures", "transformers_version", "torch_dtype", "model_file", "bos_token_id", "eos_token_id",
    "pad_token_id", "use_cache", "max_position_embeddings", "quantization_config", "_name_or_path",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Innovation:
    """How unpredictability is scored (docs/model.md section 3, step 5)."""

    signal: str | None = None  # None: ssm_output where there is an SSM, input where there is none
    error: str = "relative"
    taps: int = 4

    def __post_init__(self) -> None:
        if self.signal is not None:
            check_choice("innovation.signal", self.signal, ("ssm_output", "input"))
        check_choice("innovation.error", self.error, ("relative", "l2"))
        check_int("innovation.taps", self.taps, 1)

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
        check_choice("rope_scaling.rope_type", self.rope_type, ROPE_TYPES)
        check_number("rope_scaling.factor", self.factor, 0.0)
        needed: tuple[str, ...] = ()
        if self.rope_type == "llama3":
            needed = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        elif self.rope_type == "yarn":
            needed = ("original_max_position_embeddings",)
        for name in needed:
            if getattr(self, name) is None:
                fail(f"rope_scaling.{name}", f"is required by rope_type {self.rope_type!r}")


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in place of the MLP: `n` experts, `per_token` used, in the layers listed."""

    n: int
    per_token: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        check_int("experts.n", self.n, 1)
        check_int("experts.per_token", self.per_token, 1)
        if self.per_token > self.n:
            fail("experts.per_token", f"must be at most experts.n ({self.n}), got {self.per_token}")
        object.__setattr__(self, "layers", tuple(self.layers))


@dataclass(frozen=True, slots=True)
class Quantization:
    """The `quantization` block mlx-lm writes: affine groups along a weight's rows."""

    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 5, 6, 8):
            fail("quantization.bits", f"must be one of 2, 3, 4, 5, 6, 8, got {self.bits!r}")
        if self.group_size not in (32, 64, 128):
            fail("quantization.group_size", f"must be one of 32, 64, 128, got {self.group_size!r}")
        check_choice("quantization.mode", self.mode, ("affine",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A model's configuration. Fields left None get the default named beside them and are concrete afterwards.

    Tables (`ssm`, `innovation`, `rope_scaling`, `experts`, `quantization`) may be given as mappings. Where layers are
    of several SSM kinds, fields of `ssm` left None stay so: each kind has its own default, see `ssm_of`.
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
    n_fading: int | None = None  # of layers with an SSM: window; 0 where there is none
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
    ssm_layers: tuple[int, ...] | None = None  # bmojo layers that have the SSM; None: all of them
    innovation: Innovation = dataclasses.field(default_factory=Innovation)
    experts: Experts | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layer_types, str) or not isinstance(self.layer_types, tuple | list) or not self.layer_types:
            fail("layer_types", f"must be a list with one entry per layer, got {self.layer_types!r}")
        self._set(layer_types=tuple(self.layer_types))
        for i, kind in enumerate(self.layer_types):
            check_choice(f"layer_types[{i}]", kind, LAYER_TYPES)
        if self.n_layers is not None and self.n_layers != len(self.layer_types):
            fail("n_layers", f"is {self.n_layers!r} but layer_types has {len(self.layer_types)} entries")
        self._set(n_layers=len(self.layer_types))
        self._resolve_tables()
        self._check_widths()
        self._resolve_ssm()
        self._check_attention_window()
        self._check_memories()
        for name in ("qk_norm", "attention_bias", "tie_kv", "tie_embeddings"):
            check_bool(name, getattr(self, name))
        check_number("norm_eps", self.norm_eps, 0.0)
        check_choice("dtype", self.dtype, DTYPES)

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _resolve_tables(self) -> None:
        optional = {"rope_scaling": RopeScaling, "experts": Experts, "quantization": Quantization, "ssm": SSM}
        for name, cls in optional.items():
            if getattr(self, name) is not None:
                self._set(**{name: table(cls, name, getattr(self, name))})
        self._set(innovation=table(Innovation, "innovation", {} if self.innovation is None else self.innovation))
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "default":
            self._set(rope_scaling=None)
        if self.ssm is None:
            named = [kind for kind in self.layer_types if kind in SSM_KINDS]
            if named:
                self._set(ssm=SSM(kind=named[0]))
        for i in self.experts.layers if self.experts else ():
            check_int("experts.layers", i, 0)
            if i >= len(self.layer_types):
                fail("experts.layers", f"names layer {i} but there are {len(self.layer_types)}")

    def _check_widths(self) -> None:
        for name in ("vocab_size", "d_model", "n_heads"):
            check_int(name, getattr(self, name), 1)
        check_int("d_ff", self.d_ff, 0)
        if self.n_kv_heads is None:
            self._set(n_kv_heads=self.n_heads)
        check_int("n_kv_heads", self.n_kv_heads, 1)
        if self.n_heads % self.kv_heads:
            fail("n_kv_heads", f"must divide n_heads ({self.n_heads}), got {self.n_kv_heads}")
        if self.head_dim is None:
            if self.d_model % self.n_heads:
                fail("head_dim", f"must be given: n_heads ({self.n_heads}) does not divide d_model ({self.d_model})")
            self._set(head_dim=self.d_model // self.n_heads)
        check_int("head_dim", self.head_dim, 1)
        if self.rope_theta is not None:
            check_number("rope_theta", self.rope_theta, 0.0)
            if self.d_head % 2:
                fail("head_dim", f"must be even where rope_theta is set, got {self.head_dim}")
        elif self.rope_scaling is not None:
            fail("rope_scaling", "is set but rope_theta is null (no positions to scale)")

    def _check_ssm_layers(self) -> None:
        if self.ssm_layers is None:
            return
        if isinstance(self.ssm_layers, str) or not isinstance(self.ssm_layers, tuple | list):
            fail("ssm_layers", f"must be a list of bmojo layers or null, got {self.ssm_layers!r}")
        for i in self.ssm_layers:
            check_int("ssm_layers", i, 0)
            if i >= len(self.layer_types) or self.layer_types[i] != "bmojo":
                fail("ssm_layers", f"names layer {i}, which is not a bmojo layer")
        listed = tuple(sorted({*self.ssm_layers}))
        if listed and self.ssm is None:
            fail("ssm_layers", "names layers but ssm is null")
        # One spelling for one model: all bmojo layers, or no SSM at all, is what null says already.
        every = tuple(i for i, kind in enumerate(self.layer_types) if kind == "bmojo")
        self._set(ssm_layers=None if self.ssm is None or listed == every else listed)

    def _resolve_ssm(self) -> None:
        """Check `ssm` as every layer reads it; it becomes concrete itself where all layers read it as one kind."""
        self._check_ssm_layers()
        if self.ssm is None:
            return
        kinds = {self.ssm.kind, *(kind for kind in self.layer_types if kind in SSM_KINDS)}
        known = {"kind"}.union(*(fields_of(kind) for kind in kinds))
        for name in (f.name for f in dataclasses.fields(self.ssm)):
            if name not in known and getattr(self.ssm, name) is not None:
                fail(f"ssm.{name}", f"is not a field of {' or '.join(sorted(kinds))}")
        concrete = [self._ssm_as(kind) for kind in sorted(kinds)]
        if len(concrete) == 1:
            self._set(ssm=concrete[0])

    def _ssm_as(self, kind: str) -> SSM:
        assert self.ssm is not None
        return resolve(self.ssm, kind, self.d_model, self.n_heads, self.kv_heads, self.d_head)

    def _check_attention_window(self) -> None:
        given = self.attention_window
        if isinstance(given, list | tuple):
            self._set(attention_window=tuple(given))
            if len(given) != len(self.layer_types):
                fail("attention_window", f"lists {len(given)} layers but there are {len(self.layer_types)}")
        for w in given if isinstance(given, list | tuple) else [given]:
            if w is not None:
                check_int("attention_window", w, 1)

    def _check_memories(self) -> None:
        check_int("window", self.window, 1)
        check_int("n_eidetic", self.n_eidetic, 0)
        check_int("n_sinks", self.n_sinks, 0)
        if self.chunk is None:
            self._set(chunk=min(64, self.window))
        check_int("chunk", self.chunk, 1)
        if self.chunk_size > self.window:
            fail("chunk", f"must be at most window ({self.window}), got {self.chunk}")
        why = "ssm is null" if self.ssm is None else "ssm_layers is empty" if self.ssm_layers == () else ""
        if self.n_fading is None:
            self._set(n_fading=0 if why else self.window)
        check_int("n_fading", self.n_fading, 0)
        if why:
            if self.n_fading:
                fail("n_fading", f"must be 0 where {why} (there is nothing to fade), got {self.n_fading}")
            if self.innovation.signal == "ssm_output":
                fail("innovation.signal", f"is 'ssm_output' but {why}; use 'input' or null")

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
        """The SSM of a layer, concrete: `ssm`, with the layer's own kind where its type names one."""
        kind = self.layer_types[layer]
        if kind == "attention" or self.ssm is None:
            return None
        if kind == "bmojo" and self.ssm_layers is not None and layer not in self.ssm_layers:
            return None
        return self._ssm_as(self.ssm.kind if kind == "bmojo" else kind)

    def attention_window_of(self, layer: int) -> int | None:
        """How far an `attention` layer sees; None is full attention with a growing cache."""
        w = self.attention_window
        return w[layer] if isinstance(w, tuple) else w

    def signal_of(self, layer: int) -> str:
        """What a bmojo layer's innovation predicts: 'ssm_output', or 'input', which it is without an SSM."""
        return "input" if self.ssm_of(layer) is None else self.innovation.signal or "ssm_output"

    def fading_of(self, layer: int) -> int:
        """n_fading of a bmojo layer, 0 where it has no SSM to fade."""
        return 0 if self.ssm_of(layer) is None else self.fading

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

    def with_num_iter(self, num_iter: int) -> Self:
        """A copy whose gka mixers take `num_iter` steps of their solver. Raises ConfigError where there are none."""
        if not any(ssm is not None and ssm.kind == "gka" for ssm in map(self.ssm_of, range(len(self.layer_types)))):
            fail("num_iter", "there is no gka mixer in this model")
        assert self.ssm is not None
        return self.replace(ssm=dataclasses.replace(self.ssm, num_iter=num_iter))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, with `model_type`."""
        fields = json.loads(json.dumps(dataclasses.asdict(self)))
        if self.ssm is not None:
            fields["ssm"] = {name: value for name, value in fields["ssm"].items() if value is not None}
        return {"model_type": "bmojo", **fields}

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
                fail(key, "is not a known field of a bmojo config")
        for key in ("vocab_size", "d_model", "layer_types"):
            if key not in source:
                fail(key, "is missing")
        return cls(**{key: value for key, value in source.items() if key in names})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """A named configuration with any field overridden; `ssm` and `innovation` tables merge, `ssm=None` removes it.

        An `ssm` of another kind starts from that kind's defaults. `n_layers` alone repeats the preset's layer type.
        """
        from bmojo_edge.presets import PRESETS

        if name not in PRESETS:
            raise ConfigError(f"preset: {name!r} is not one of {', '.join(PRESETS)}")
        fields = dict(PRESETS[name])
        names = {f.name for f in dataclasses.fields(cls)}
        for key, value in overrides.items():
            if key not in names:
                fail(key, "is not a known field of a bmojo config")
            base = fields.get(key)
            if key == "ssm" and isinstance(base, Mapping) and isinstance(value, Mapping):
                same = value.get("kind", base["kind"]) == base["kind"]
                base = base if same else {}  # another kind's sizes say nothing about this one
            merges = key in ("ssm", "innovation") and isinstance(base, Mapping) and isinstance(value, Mapping)
            fields[key] = {**base, **value} if merges and base is not None else value
        if overrides.get("n_layers") is not None and "layer_types" not in overrides:
            check_int("n_layers", overrides["n_layers"], 1)
            fields["layer_types"] = (fields["layer_types"][0],) * overrides["n_layers"]
        return cls(**fields)
