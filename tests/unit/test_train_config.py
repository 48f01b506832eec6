"""Settings of training: every wrong field is named, overrides, the examples that ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bmojo_edge.checks import ConfigError
from bmojo_edge.config import Config
from bmojo_edge.special_cases import special_case
from bmojo_edge.train_config import TrainConfig

EXAMPLES = Path(__file__).parents[2] / "apps" / "train"


def content(**fields: Any) -> dict[str, Any]:
    return {"out": "run", "steps": 10, "model": {"preset": "tiny"}, "data": {"train": "data"}, **fields}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stepss": 1}, "stepss: is not a known field"),
        ({"steps": "many"}, "steps: must be an integer, got 'many'"),
        ({"steps": True}, "steps: must be an integer"),
        ({"data": {}}, "data.train: is missing"),
        ({"data": 3}, "data: must be a table, got 3"),
        ({"data": {"train": "d", "sequence_length": 0}}, "data.sequence_length: must be at least 1"),
        ({"data": {"train": "d", "align": 100}}, r"data.align: must divide data.sequence_length \(2048\)"),
        ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate: is not a known field"),
        ({"optimizer": {"lr": "high"}}, "optimizer.lr: must be a finite number, got 'high'"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: must be a finite number"),
        ({"optimizer": {"lr": 1e-6}}, "optimizer.final_lr: must be at least 0 and at most 1e-06"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas: must be two numbers"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas: must be below 1"),
        ({"system": {"strategy": "tp"}}, "system.strategy: must be one of ddp, fsdp, got 'tp'"),
        ({"system": {"compile": 1}}, "system.compile: must be true or false"),
        ({"batch": {"tokens": 3000}}, r"batch.tokens: must be a multiple of data.sequence_length \(2048\)"),
        ({"checkpoints": {"keep": 0}}, "checkpoints.keep: must be at least 1"),
        ({"model": "tiny"}, "model: must be a table"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(content(**fields))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"preset": "tiny", "widnow": 3}, "model.widnow: is not a known field"),
        ({"preset": "huge"}, "model.preset: 'huge' is not one of"),
        ({"d_model": 8}, "model.layer_types: is missing"),
        ({"preset": "tiny", "vocab_size": 10}, "model.vocab_size: is 10, the data has 99 tokens"),
        ({"preset": "tiny", "n_heads": 3}, "model.n_kv_heads|model.n_heads"),
    ],
)
def test_a_wrong_model_field_is_named(model: dict[str, Any], message: str) -> None:
    settings = TrainConfig.from_dict(content(model={"n_kv_heads": 2, **model} if "n_heads" in model else model))
    with pytest.raises(ConfigError, match=message):
        settings.model_config(99)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for name in ("out", "steps", "model", "data"):
        fields = content()
        del fields[name]
        with pytest.raises(ConfigError, match=f"{name}: is missing"):
            TrainConfig.from_dict(fields)
    with pytest.raises(ConfigError, match=r"none\.toml: no such file"):
        TrainConfig.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML"):
        TrainConfig.read(tmp_path / "bad.toml")


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text('out = "a"\nsteps = 1\n[model]\npreset = "tiny"\n[data]\ntrain = "d"\n')
    given = ["optimizer.lr=1e-3", "out=runs/b", "model.window=64", "data.carry=false", 'data.valid="v w"', "steps=7"]
    settings = TrainConfig.read(path, given)
    assert (settings.optimizer.lr, settings.out, settings.steps) == (1e-3, "runs/b", 7)
    assert (settings.data.carry, settings.data.valid, settings.model["window"]) == (False, "v w", 64)
    with pytest.raises(ConfigError, match=r"--set optimizer\.lr: must be key=value"):
        TrainConfig.read(path, ["optimizer.lr"])
    with pytest.raises(ConfigError, match="steps is not a table"):
        TrainConfig.read(path, ["steps.x=1"])
    with pytest.raises(ConfigError, match=r"train\.toml: optimizer\.lrr: is not a known field"):
        TrainConfig.read(path, ["optimizer.lrr=1"])


def test_rows_are_shared() -> None:
    settings = TrainConfig.from_dict(content(batch={"tokens": 2048 * 12, "rows": 4}))
    assert settings.rows_of(1) == (12, 4) and settings.rows_of(3) == (4, 4) and settings.rows_of(6) == (2, 2)
    with pytest.raises(ConfigError, match=r"batch\.tokens: make 12 rows, which 5 processes cannot share"):
        settings.rows_of(5)
    with pytest.raises(ConfigError, match=r"batch\.rows: must divide the 6 rows of a process, got 4"):
        settings.rows_of(2)


def test_vocabulary_and_grid_follow_from_data_and_model() -> None:
    settings = TrainConfig.from_dict(content())
    model = settings.model_config(1000)
    assert model.vocab_size == 1000 and settings.align_of(model) == model.chunk
    assert settings.align_of(Config(vocab_size=9, d_model=8, layer_types=("mamba",))) == 1
    odd = TrainConfig.from_dict(content(data={"train": "d", "sequence_length": 100}, batch={"tokens": 100}))
    with pytest.raises(ConfigError, match=r"data\.sequence_length: must be a multiple of model\.chunk \(32\)"):
        odd.align_of(model)


def test_settings_are_plain_values() -> None:
    settings = TrainConfig.from_dict(content(optimizer={"betas": [0.8, 0.9]}))
    assert TrainConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize("name", ["bmojo", "transformer", "mamba", "hybrid", "windowed"])
def test_examples(name: str) -> None:
    settings = TrainConfig.read(EXAMPLES / f"{name}.toml")
    model = settings.model_config(32_000)
    assert settings.rows_of(1)[0] * settings.data.sequence_length == settings.batch.tokens
    settings.align_of(model)
    cases = {
        "bmojo": "B'MOJO",
        "transformer": "Transformer",
        "mamba": "Mamba",
        "hybrid": "hybrid",
        "windowed": "sliding-window",
    }
    assert cases[name].lower() in special_case(model).lower()
