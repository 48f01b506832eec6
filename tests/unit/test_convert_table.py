"""The table of names, the choice of memories, and models that are ours already."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmojo_convert import ConvertError, convert, default, hmf
from bmojo_convert.memories import Memories, adapt
from bmojo_convert.names import (
    GGUF_LLAMA,
    GGUF_TRANSFORMER,
    HF_JAMBA,
    HF_MAMBA,
    HF_MAMBA2,
    HF_TRANSFORMER,
    Renamed,
    Stored,
    Table,
)
from bmojo_edge import Config, checkpoint, golden, hub
from bmojo_edge.parameters import parameter_shapes
from tests.helpers import GRID, odd, random_weights

EVERYTHING = Config(
    vocab_size=11, d_model=12, d_ff=20, n_heads=4, n_kv_heads=2, head_dim=6, layer_types=("attention",) * 3,
    qk_norm=True, attention_bias=True, rope_theta=100.0,
)  # fmt: skip
_SIZES: dict[str, Any] = {"vocab_size": 11, "d_model": 12, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6}
_LOW_RANK = {"kv_proj_rank": 2, "kv_learnable_residual": True}
_HMF: dict[str, Any] = {"d_ff": 20, "qk_norm": True, "attention_bias": True, "tie_kv": False}
_HMF_MAMBA2 = {"kind": "mamba2", "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "d_state": 6, "bc_norm": True}


def _of(*kinds: str, **fields: Any) -> Config:
    return Config(layer_types=kinds, **{**_SIZES, **fields})


def _hmf(kind: str, ssm: dict[str, Any]) -> Config:
    """Every unfused symbol with one mixer: B'MOJO-F around it, it alone, full and sliding attention."""
    kinds = ("attention", "bmojo", kind, "attention", "bmojo")
    return _of(*kinds, attention_window=(None, None, None, 5, None), ssm=ssm, **_HMF)


# Tables, and models that have all of a table's parameters between them.
MODELS: dict[str, tuple[Table, list[Config]]] = {
    "hf": (HF_TRANSFORMER, [EVERYTHING]),
    "gguf llama": (GGUF_LLAMA, [EVERYTHING]),
    "gguf": (GGUF_TRANSFORMER, [EVERYTHING]),
    "mamba": (HF_MAMBA, [_of(*["mamba"] * 3, ssm={"kind": "mamba", "bias": True})]),
    "mamba2": (HF_MAMBA2, [_of(*["mamba2"] * 3, ssm={"kind": "mamba2", "bias": True})]),
    "jamba": (
        HF_JAMBA,
        [
            _of(
                "mamba", "attention", "mamba", d_ff=20,
                ssm={"kind": "mamba", "bias": True, "dt_bc_norm": True},
                experts={"n": 3, "per_token": 2, "layers": (1, 2)},
            )
        ],
    ),
    "hmf": (
        hmf.HMF,
        [
            _hmf("mamba2", _HMF_MAMBA2),
            _hmf("gdn", {"kind": "gdn", "conv_bias": True, **_LOW_RANK}),
            _hmf("gka", {"kind": "gka", **_LOW_RANK}),
        ],
    ),
}  # fmt: skip
VARIANTS = [
    pytest.param(name, changes, id=f"{name} {changes}")
    for name in MODELS
    for changes in ({}, {"tie_embeddings": True}, {"qk_norm": False}, {"attention_bias": False})
    if name in ("hf", "gguf llama", "gguf", "hmf") or "tie_embeddings" in changes or not changes
]


def _table(name: str, config: Config) -> Table:
    return hmf.table(config) if name == "hmf" else MODELS[name][0]


def _source(config: Config, table: Table) -> dict[str, tuple[int, ...]]:
    """The tensors a source of this config has, by the table read from its other side."""
    layers = range(len(config.layer_types))
    shapes = parameter_shapes(config)
    found = {}
    for row in table.rows:
        for i in layers if "{i}" in row.ours else [0]:
            ours, experts = row.ours.format(i=i), config.experts
            if ours not in shapes:
                continue
            places = table.places(config, i) if "{i}" in row.ours else {}
            for e in range(experts.n) if "{e}" in row.theirs and experts else [0]:
                shape = shapes[ours][1:] if "{e}" in row.theirs else shapes[ours]
                found[row.theirs.format(i=i, e=e, **places)] = shape
    return found


def _renamed(config: Config, table: Table, shapes: dict[str, tuple[int, ...]]) -> Renamed:
    return Renamed(config, table, Stored(shapes, lambda name: np.zeros(shapes[name], np.float32)), "x.gguf")


def _our_rows(config: Config) -> set[str]:
    return {
        "layers.{i}." + name.split(".", 2)[2] if name.startswith("layers.") else name
        for name in parameter_shapes(config)
    }


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_table_is_complete(name: str, changes: dict[str, Any]) -> None:
    """Every parameter of a model has its row, and every tensor of the source is used once."""
    for everything in MODELS[name][1]:
        config = everything.replace(**changes)
        table = _table(name, config)
        shapes = _source(config, table)
        renamed = _renamed(config, table, shapes)
        assert list(renamed) == list(parameter_shapes(config))
        assert all(renamed[ours].shape == shape for ours, shape in parameter_shapes(config).items())
        experts = config.experts
        stacked = 0 if experts is None else 3 * (experts.n - 1) * len(experts.layers)
        assert len(shapes) == len(renamed) + stacked


@pytest.mark.parametrize("name", MODELS)
def test_table_has_no_row_too_many(name: str) -> None:
    """Each row has its parameter in some model, and no two rows share a tensor or a parameter."""
    table, configs = MODELS[name]
    assert {row.ours for row in table.rows} == set().union(*map(_our_rows, configs))
    assert len({row.ours for row in table.rows}) == len({row.theirs for row in table.rows}) == len(table.rows)
    assert all({field for _, field, _, _ in string.Formatter().parse(row.ours)} <= {None, "i"} for row in table.rows)


@pytest.mark.parametrize("name", MODELS)
def test_table_is_strict(name: str) -> None:
    """Any tensor taken away, added or reshaped is named."""
    for config in MODELS[name][1]:
        table = _table(name, config)
        shapes = _source(config, table)
        for tensor, shape in shapes.items():
            without = {key: value for key, value in shapes.items() if key != tensor}
            with pytest.raises(ConvertError, match=f"x.gguf: tensor '{re.escape(tensor)}' is missing"):
                _renamed(config, table, without)
            with pytest.raises(ConvertError, match=f"x.gguf: tensor '{re.escape(tensor)}' has shape"):
                _renamed(config, table, {**shapes, tensor: (*shape[:-1], shape[-1] + 1)})
        with pytest.raises(ConvertError, match=r"x.gguf: 2 tensor\(s\) left over, such as 'a.weight'"):
            _renamed(config, table, {**shapes, "a.weight": (1,), "b": (1,)})
        layer = next(name for name in shapes if ".2." in name)
        with pytest.raises(ConvertError, match="left over"):
            _renamed(config, table, {**shapes, layer.replace(".2.", ".9."): (1,)})


_NORM = "model.layers.0.input_layernorm.weight"


def test_a_layer_the_format_lacks() -> None:
    config = odd("mamba", ssm={"kind": "mamba"})
    with pytest.raises(ConvertError, match=r"this format has no tensor for 'layers\.0\.mixer\.in_proj\.weight'"):
        _renamed(
            config,
            HF_TRANSFORMER,
            {"model.embed_tokens.weight": (37, 20), "model.layers.0.input_layernorm.weight": (20,)},
        )


# --- memories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "asked", "kinds", "window", "left"),
    [
        (None, 8, "bbb", 8, None),
        (20, 8, "bbb", 8, None),
        (20, 20, "bbb", 20, None),
        (20, 64, "bbb", 20, None),
        ((None, 20, 5), 10, "bba", 10, (None, None, 5)),
        ((None, 20, 5), 64, "baa", 64, (None, 20, 5)),
        ((12, 20, 5), 64, "aba", 20, (12, None, 5)),
        ((12, 20, 5), 4, "bbb", 4, None),
    ],
)
def test_windows(own: Any, asked: int, kinds: str, window: int, left: Any) -> None:
    """No layer sees farther than it did, and none keeps a growing cache."""
    config = adapt(EVERYTHING.replace(attention_window=own), Memories(window=asked, eidetic=3), "x")
    assert config.layer_types == tuple({"b": "bmojo", "a": "attention"}[kind] for kind in kinds)
    assert (config.window, config.n_sinks, config.n_eidetic, config.n_fading) == (window, 4, 3, 0)
    assert config.attention_window == left
    assert config.chunk == min(64, window)
    assert not config.growing_layers


def test_windows_in_hybrids() -> None:
    """State-space layers stay, attention loses its growing cache, and nothing fades in a layer without an SSM."""
    jamba = MODELS["jamba"][1][0].replace(n_fading=0)
    config = adapt(jamba, Memories(window=8), "x")
    assert (config.layer_types, config.ssm_layers) == (("mamba", "bmojo", "mamba"), ())
    assert (config.window, config.n_sinks, config.n_fading, config.n_eidetic) == (8, 4, 0, 0)
    assert config.ssm_of(0) == jamba.ssm_of(0)
    assert parameter_shapes(config) == parameter_shapes(jamba)

    factory = _hmf("gdn", {"kind": "gdn"}).replace(window=16, n_fading=16, chunk=5)
    for window, kinds, own in ((16, "bbgab", (None, None, None, 5, None)), (4, "bbgbb", None)):
        config = adapt(factory, Memories(window=window), "x")
        assert config.layer_types == tuple({"b": "bmojo", "a": "attention", "g": "gdn"}[kind] for kind in kinds)
        assert config.attention_window == own
        assert config.ssm_layers == (1, 4)
        assert (config.window, config.n_sinks, config.n_fading, config.chunk) == (window, 4, 16, min(5, window))
        assert parameter_shapes(config) == parameter_shapes(factory)
        assert not config.growing_layers
        assert adapt(config, Memories(window=32), "x").ssm_layers == (1, 4)
    assert adapt(factory, Memories(sinks=2, eidetic=3), "x") == factory.replace(n_sinks=2, n_eidetic=3)

    sliding = _of("attention", "bmojo", ssm={"kind": "gdn"}, attention_window=(5, None), window=16)
    assert adapt(sliding, Memories(window=8), "x") == sliding.replace(window=8, chunk=8)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_window_for_a_model_without_attention(kind: str) -> None:
    with pytest.raises(ConvertError, match="window: x has no attention to give a window"):
        adapt(MODELS[kind][1][0], Memories(window=8), "x")


def test_models_with_memories_keep_what_is_not_asked_for() -> None:
    config = adapt(odd(), Memories(window=40, eidetic=7), "x")
    assert dataclasses.asdict(config) == dataclasses.asdict(odd(window=40, n_eidetic=7, chunk=3))
    assert adapt(odd(), Memories(sinks=1), "x") == odd(n_sinks=1)
    assert adapt(odd(), Memories(window=2), "x").chunk == 2
    assert adapt(odd(), Memories(), "x") == odd()


# --- ours -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["all", "untied, qk-norm, bias", "mixed", "experts", "norms in the ssm"])
def test_ours_to_ours(case: str, tmp_path: Path) -> None:
    config, weights = GRID[case], random_weights(GRID[case])
    checkpoint.save(tmp_path / "a", config, weights)
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [3]}')
    out = convert(tmp_path / "a", tmp_path / "b", dtype="float32")
    got_config, got = checkpoint.read(out)
    assert got_config == config
    assert all(np.array_equal(got[name], weights[name]) for name in weights)
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [3]}
    made = golden.read(out)
    assert made is not None
    assert made.author.startswith("bmojo_edge.reference")
    half = convert(tmp_path / "a", tmp_path / "c", dtype="bfloat16")
    assert checkpoint.read(half)[0] == config.replace(dtype="bfloat16")


@pytest.mark.parametrize("form", ["mapping", "text", "beside"])
@pytest.mark.parametrize("key", ["weights", "model", "state_dict"])
def test_pytorch_file(form: str, key: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config, weights = odd(dtype="bfloat16"), random_weights(odd())
    tensors = {name: torch.from_numpy(array).bfloat16() for name, array in weights.items()}
    content: dict[str, Any] = {key: tensors}
    if form == "beside":
        (tmp_path / "config.json").write_text(config.to_json())
        content = tensors if key == "weights" else content
    else:
        content["config"] = config.to_dict() if form == "mapping" else config.to_json()
    torch.save(content, tmp_path / "model.pt")
    out = convert(tmp_path / "model.pt", tmp_path / "out", dtype="float32")
    got_config, got = checkpoint.read(out)
    assert got_config == config.replace(dtype="float32")
    name = "layers.0.mixer.ssm.A_log"
    np.testing.assert_array_equal(got[name], tensors[name].float().numpy())
    tensors.pop(name)
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ConvertError, match=f"model.pt: tensor '{name}' is missing"):
        convert(tmp_path / "model.pt", tmp_path / "out2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a mapping"),
        ({"config": {"model_type": "bmojo"}}, "has none of weights, model, state_dict"),
        ({"config": {"model_type": "bmojo"}, "weights": {}}, "config: vocab_size: is missing"),
        ({"config": {}, "weights": {"a": 3}}, "config: "),
        ({"weights": {"a": 3}}, r"config\.json: file is missing"),
    ],
)
def test_pytorch_files_of_another_form(content: Any, message: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(checkpoint.CheckpointError, match=message):
        convert(tmp_path / "model.pt", tmp_path / "out")
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04 not much else")
    with pytest.raises(ConvertError, match=r"model\.pt: "):
        convert(tmp_path / "model.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the hub and the default model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "is_id"),
    [("owner/name", True), ("HuggingFaceTB/SmolLM2-135M", True), ("a.b/c_d", True), ("./a", False), ("../a", False),
     ("a", False), ("/a/b", False), ("a/b/c", False), ("~/a", False), ("a/", False), ("a b/c", False)],
)  # fmt: skip
def test_hub_ids(source: str, is_id: bool) -> None:
    assert hub.is_hub_id(source) == is_id


def test_hub_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id becomes a folder of what is needed, with the revision asked for and progress in bytes."""
    import huggingface_hub

    checkpoint.save(tmp_path / "snapshot", odd(), random_weights(odd()))
    asked: dict[str, Any] = {}

    def snapshot(repo: str, **options: Any) -> str:
        asked.update(repo=repo, **options)
        with options["tqdm_class"](total=10, unit="B", name="x", desc="y", disable=True) as bar:
            bar.update(4)
            bar.refresh()
        with options["tqdm_class"](range(3)) as files:
            list(files)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    seen: list[tuple[str, int, int]] = []
    out = convert("owner/name", tmp_path / "out", revision="v2", progress=lambda *step: seen.append(step))
    assert checkpoint.read(out)[0].layer_types == odd().layer_types
    assert (asked["repo"], asked["revision"]) == ("owner/name", "v2")
    assert "model*.safetensors" in asked["allow_patterns"]
    assert not [pattern for pattern in asked["allow_patterns"] if pattern.endswith((".bin", ".pt", ".py"))]
    assert ("download", 4, 10) in seen
    assert {step[2] for step in seen if step[0] == "download"} == {10}


@pytest.fixture
def small_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the default model's source, and a cache of our own."""
    source = odd("attention", "attention", ssm=None)
    checkpoint.save(tmp_path / "source", source, random_weights(source))
    monkeypatch.setenv("BMOJO_EDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(default, "default_source", lambda: tmp_path / "source")
    return tmp_path / "home"


def test_default_model(small_default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once, with the window and sinks of an adapted Transformer; again when damaged or when the recipe changes."""
    seen: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        seen.append(stage)

    path = default.ensure_default_model(progress)
    assert path.parent == small_default / "models"
    config, _ = checkpoint.read(path)
    assert (set(config.layer_types), config.window, config.n_sinks, config.n_eidetic) == ({"bmojo"}, 1024, 4, 0)
    assert config.chunk == 64
    assert seen
    seen.clear()
    assert default.ensure_default_model(progress) == path
    assert not seen
    (path / "model.safetensors").write_bytes(b"damaged")
    assert checkpoint.read(default.ensure_default_model(progress))[0] == config
    assert seen
    monkeypatch.setattr(default, "RECIPE", default.RECIPE + 1)
    newer = default.ensure_default_model()
    assert newer != path
    assert [entry.name for entry in (small_default / "models").iterdir() if not entry.name.startswith(".")] == [
        newer.name
    ]


def test_default_model_in_two_processes(small_default: Path, tmp_path: Path) -> None:
    """The second waits for the first and finds its work done."""
    script = (
        "import sys; from pathlib import Path; from bmojo_convert import default\n"
        f"default.default_source = lambda: Path({str(tmp_path / 'source')!r})\n"
        "default.ensure_default_model(lambda *step: print(*step))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    both = [
        subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    texts = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("golden 1 1" in text for text in texts) == [False, True]
    assert checkpoint.read(default.default_model_path())[0].window == 1024


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BMOJO_EDGE_HOME", raising=False)
    assert default.home() == Path.home() / ".cache" / "bmojo-edge"
    monkeypatch.setenv("BMOJO_EDGE_HOME", "~/elsewhere")
    assert default.home() == Path.home() / "elsewhere"
