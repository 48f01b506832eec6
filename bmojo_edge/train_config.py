"""The configuration of a training run: frozen tables read from TOML, every field checked by name.

It knows what can be asked for and nothing of how it is done: no framework is imported here. docs/training.md explains
each field; apps/train has examples.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bmojo_edge.checks import ConfigError, check_bool, check_choice, check_int, check_number, fail, table
from bmojo_edge.config import Config

STRATEGIES = ("ddp", "fsdp")
PRECISIONS = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda", "mps")
CARRY = "data.carry"


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        fail(name, f"must be a text that is not empty, got {value!r}")


def _check_number(name: str, value: object, least: float, most: float | None = None) -> None:
    check_number(name, value, float("-inf"))
    assert isinstance(value, int | float)
    if value < least or (most is not None and value > most):
        limit = "" if most is None else f" and at most {most:g}"
        fail(name, f"must be at least {least:g}{limit}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What is read, and how it is cut into rows."""

    train: str  # a prepared data folder
    valid: str | None = None
    sequence_length: int = 2048
    carry: bool = True  # rows go on where they ended, with their state; False: every row starts fresh
    align: int | None = None  # documents start at multiples of this; None: the model's chunk where it has bmojo layers

    def __post_init__(self) -> None:
        _check_text("data.train", self.train)
        if self.valid is not None:
            _check_text("data.valid", self.valid)
        check_int("data.sequence_length", self.sequence_length, 1)
        check_bool(CARRY, self.carry)
        if self.align is not None:
            check_int("data.align", self.align, 1)
            if self.sequence_length % self.align:
                fail("data.align", f"must divide data.sequence_length ({self.sequence_length}), got {self.align}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """How many tokens make a step. Rows of all processes together: tokens / sequence_length."""

    tokens: int = 524_288  # of one optimizer step, over all processes
    rows: int = 8  # most rows a process computes at a time; the rest is accumulated

    def __post_init__(self) -> None:
        check_int("batch.tokens", self.tokens, 1)
        check_int("batch.rows", self.rows, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """AdamW with a warm-up, then a cosine to final_lr; the paper's settings where it states them."""

    lr: float = 6e-4  # of everything but the state-space layers
    ssm_lr_scale: float = 5.0
    final_lr: float = 1e-5
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0  # largest norm of the gradient

    def __post_init__(self) -> None:
        check_number("optimizer.lr", self.lr, 0.0)
        check_number("optimizer.ssm_lr_scale", self.ssm_lr_scale, 0.0)
        _check_number("optimizer.final_lr", self.final_lr, 0.0, self.lr)
        _check_number("optimizer.warmup", self.warmup, 0.0, 1.0)
        _check_number("optimizer.weight_decay", self.weight_decay, 0.0)
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            fail("optimizer.betas", f"must be two numbers, got {self.betas!r}")
        object.__setattr__(self, "betas", tuple(self.betas))
        for beta in self.betas:
            _check_number("optimizer.betas", beta, 0.0)
            if beta >= 1:
                fail("optimizer.betas", f"must be below 1, got {beta}")
        check_number("optimizer.eps", self.eps, 0.0)
        check_number("optimizer.clip", self.clip, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Where and how it is computed. None chooses: cuda, else mps, else cpu; bfloat16 on cuda, else float32."""

    device: str | None = None
    precision: str | None = None  # of the computation; parameters, their gradients and the optimizer are float32
    strategy: str = "ddp"  # of several processes
    recompute: bool = False  # layers keep their inputs alone and compute the rest again in the backward pass
    compile: bool = False  # torch.compile of each layer
    deterministic: bool = False  # only operations that give the same bits every time
    peak_tflops: float | None = None  # of one device, for utilisation; None: known devices alone

    def __post_init__(self) -> None:
        if self.device is not None:
            check_choice("system.device", self.device, DEVICES)
        if self.precision is not None:
            check_choice("system.precision", self.precision, PRECISIONS)
        check_choice("system.strategy", self.strategy, STRATEGIES)
        for name in ("recompute", "compile", "deterministic"):
            check_bool(f"system.{name}", getattr(self, name))
        if self.peak_tflops is not None:
            check_number("system.peak_tflops", self.peak_tflops, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """When a step is kept. The last step always is."""

    every: int = 500  # steps
    keep: int = 3  # the latest

    def __post_init__(self) -> None:
        check_int("checkpoints.every", self.every, 1)
        check_int("checkpoints.keep", self.keep, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """When the loss on data.valid is measured, and on how much of it."""

    every: int = 500  # steps
    rows: int = 64  # of sequence_length tokens, the first of the data set

    def __post_init__(self) -> None:
        check_int("validation.every", self.every, 1)
        check_int("validation.rows", self.rows, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What is written besides log.jsonl, which always is."""

    tensorboard: bool = False
    wandb: str | None = None  # the name of a project

    def __post_init__(self) -> None:
        check_bool("log.tensorboard", self.tensorboard)
        if self.wandb is not None:
            _check_text("log.wandb", self.wandb)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A training run. Make one with `TrainConfig.read(path, overrides)`; raises ConfigError naming the field.

    model: fields of a `Config`, with `preset` for those not given, or with `init`, a model folder whose config and
    weights are where training starts. vocab_size may be left out: it is the data's.
    """

    out: str  # the folder of the run
    steps: int
    model: Mapping[str, Any]
    data: Data
    seed: int = 0
    max_divergence: float = 2.0  # nats the mean loss of 20 steps may rise above its lowest before the run stops
    batch: Batch = field(default_factory=Batch)
    optimizer: Optimizer = field(default_factory=Optimizer)
    system: System = field(default_factory=System)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    validation: Validation = field(default_factory=Validation)
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        _check_text("out", self.out)
        check_int("steps", self.steps, 1)
        check_int("seed", self.seed, 0)
        check_number("max_divergence", self.max_divergence, 0.0)
        if not isinstance(self.model, Mapping):
            fail("model", f"must be a table, got {self.model!r}")
        for name, cls in _TABLES.items():
            object.__setattr__(self, name, _table(cls, name, getattr(self, name)))
        if self.batch.tokens % self.data.sequence_length:
            fail(
                "batch.tokens",
                f"must be a multiple of data.sequence_length ({self.data.sequence_length}), got {self.batch.tokens}",
            )

    @property
    def rows(self) -> int:
        """Rows of a step, over all processes."""
        return self.batch.tokens // self.data.sequence_length

    def rows_of(self, processes: int) -> tuple[int, int]:
        """Rows of one process, and how many of them it computes at a time."""
        if self.rows % processes:
            fail("batch.tokens", f"make {self.rows} rows, which {processes} processes cannot share equally")
        own = self.rows // processes
        at_once = min(own, self.batch.rows)
        if own % at_once:
            fail("batch.rows", f"must divide the {own} rows of a process, got {self.batch.rows}")
        return own, at_once

    def align_of(self, model: Config) -> int:
        """The grid documents start on."""
        if self.data.align is not None:
            return self.data.align
        chunk = model.chunk_size if "bmojo" in model.layer_types else 1
        if self.data.sequence_length % chunk:
            fail("data.sequence_length", f"must be a multiple of model.chunk ({chunk})")
        return chunk

    def model_config(self, vocab_size: int) -> Config:
        """The model's config, for data of `vocab_size` tokens; without `model.init`, which only the engine reads."""
        fields = {name: value for name, value in self.model.items() if name != "preset"}
        given = fields.setdefault("vocab_size", vocab_size)
        if isinstance(given, int) and given < vocab_size:
            fail("model.vocab_size", f"is {given}, the data has {vocab_size} tokens")
        try:
            preset = self.model.get("preset")
            return Config.from_json(fields) if preset is None else Config.preset(preset, **fields)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"model.{error}") from None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """From parsed TOML or JSON; unknown fields are refused by name."""
        names = {f.name: f for f in dataclasses.fields(cls)}
        for key in content:
            if key not in names:
                fail(key, f"is not a known field; known are {', '.join(names)}")
        for name in ("out", "steps", "model", "data"):
            if name not in content:
                fail(name, "is missing")
        return cls(**content)

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """From a TOML file, with `key=value` overrides such as `optimizer.lr=1e-3`; values are TOML, or else text.

        Relative paths in it are relative to where the program runs.
        """
        path = Path(path)
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid TOML ({error})") from None
        for override in overrides:
            _set(content, override)
        try:
            return cls.from_dict(content)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


_TABLES: dict[str, type] = {
    "data": Data,
    "batch": Batch,
    "optimizer": Optimizer,
    "system": System,
    "checkpoints": Checkpoints,
    "validation": Validation,
    "log": Log,
}


def _table(cls: type, name: str, value: object) -> Any:
    """A table from its mapping; a field that is missing is named."""
    if isinstance(value, Mapping):
        for f in dataclasses.fields(cls):
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and f.name not in value:
                fail(f"{name}.{f.name}", "is missing")
    return table(cls, name, value)


def _set(content: dict[str, Any], override: str) -> None:
    """Put `a.b=value` into parsed TOML."""
    key, equals, text = override.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        raise ConfigError(f"--set {override}: must be key=value, such as optimizer.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    inner = content
    for name in names[:-1]:
        inner = inner.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {name} is not a table")
    inner[names[-1]] = value
