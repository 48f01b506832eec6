"""Hybrid Model Factory's checkpoints: converted logits equal the published equations', on the oracle and both twins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmojo_convert import convert, hmf
from bmojo_edge import checkpoint, golden
from bmojo_edge.special_cases import special_case
from tests.parity import engines
from tests.parity import hybrid_model_factory as factory

ROUNDING = {"oracle": 1e-6, "torch": 2e-5, "mlx": 2e-5}
KALMANET = 2e-4  # it divides by what it remembers: where queries miss every key, outputs cancel in float32

UNTIED = {"bmojo_config": {"tie_attn_weights": False}}
EVERY = "*-BMF-SWA-M2-GDN"
CASES: dict[str, dict[str, Any]] = {
    "qwen3, B'MOJO-F with mamba2": {"pattern": "*-BMF-BMF"},
    "qwen3, untied": {"pattern": "BMF-*", **UNTIED},
    "qwen3, B'MOJO-F with gdn": {"pattern": "BMF-*", "bmojo_config": {"ssm_mixer": "gdn"}},
    "qwen3, B'MOJO-F with gdn, untied": {
        "pattern": "BMF", "bmojo_config": {"ssm_mixer": "Gated_DeltaNet", "tie_attn_weights": False},
    },
    "qwen3, B'MOJO-F with gka": {"pattern": "BMF-*", "bmojo_config": {"ssm_mixer": "gka"}},
    "qwen3, B'MOJO-F with gka, untied": {
        "pattern": "BMF", "bmojo_config": {"ssm_mixer": "gated_kalmanet", "tie_attn_weights": False},
    },
    "qwen3, every symbol": {"pattern": EVERY, "tie_word_embeddings": True},
    "qwen3, gka alone, own fields": {
        "pattern": "GKA-*",
        "gka_config": {
            "num_iter": 7, "ridge_strength": 0.1, "conv_size": 3, "use_v_conv": False, "use_alpha_connection": False,
            "use_beta_gate": False, "gla_rescale": False, "norm_eps": 1e-3, "solver_type": "chebyshev",
            "bp_lambda": False, "chunk_size": 128, "head_dim": 6, "kv_proj_rank": None,
        },
    },
    "qwen3, gka without forgetting": {"pattern": "GKA", "gka_config": {"use_forgetting_gate": False}},
    "qwen3, gka, H keeps everything": {"pattern": "GKA", "gka_config": {"use_forgetting_gate_kk": False}},
    "qwen3, gka, low rank": {"pattern": "GKA", "gka_config": {"kv_proj_rank": 3, "use_gate": False}},
    "qwen3, gdn alone, own fields": {
        "pattern": "GDN-SWA",
        "gdn_config": {
            "use_gate": False, "allow_neg_eigval": True, "conv_size": 2, "conv_bias": True, "norm_eps": 1e-3,
            "kv_proj_rank": 3, "kv_learnable_residual": True,
        },
    },
    "qwen3, gdn without convolutions": {"pattern": "GDN", "gdn_config": {"use_short_conv": False}},
    "qwen3, low rank that nothing reads": {
        "pattern": "GDN-GKA", "num_key_value_heads": 4,
        "gdn_config": {"kv_proj_rank": 3, "kv_learnable_residual": True, "norm_eps": 1e-4},
        "gka_config": {"kv_proj_rank": 3, "kv_learnable_residual": True, "norm_eps": 1e-4},
    },
    "qwen3, mamba2 without norms": {"pattern": "M2-*", "mamba2_config": {"use_qk_norm": False, "use_pos_emb": False}},
    "qwen3, mamba2, all fields": {
        "pattern": "M2-BMF",
        "mamba2_config": {
            "d_model": 20, "d_inner": 24, "d_xb": 12, "intermediate_size": 28, "hidden_act": "silu", "n_layer": 2,
            "rms_norm_eps": 1e-5, "ssm_cfg": {"expand": 1, "ngroups": 4, "d_state": 6}, "use_qk_norm": True,
            "use_pos_emb": False, "chunk_size": 128, "xb_proj_rank": None,
        },
    },
    "llama": {"pattern": "M2-*-BMF-SWA", "kind": "llama"},
    "llama, linear": {
        "pattern": "GDN-M2-GKA", "kind": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0},
    },
    "qwen2": {"pattern": EVERY, "kind": "qwen2", **UNTIED},
    "qwen2, gka": {"pattern": "GKA-BMF", "kind": "qwen2", "bmojo_config": {"ssm_mixer": "gka"}},
}  # fmt: skip


def _case(name: str) -> dict[str, Any]:
    return factory.config(**CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, tmp_path: Path) -> None:
    """Whole, in pieces and token by token; windows of 7 and 14 are passed many times."""
    c = _case(name)
    weights = factory.tensors(c)
    out = convert(factory.save(tmp_path / "source", c, weights, shards=3), tmp_path / "out", dtype="float32")
    made = golden.read(out)
    assert made is not None
    assert made.author.startswith("bmojo_edge.reference")
    ids = np.random.default_rng(5).integers(0, factory.V, 67)
    ref = factory.logits(c, weights, ids)[None]
    for engine in engines.NAMES:
        bound = max(ROUNDING[engine], KALMANET if "gka" in name and engine != "oracle" else 0)
        with engines.opened(engine, out) as forward:
            assert golden.rms_ratio(forward(ids[None], None)[0], ref) < bound, engine
            for pieces in ([13, 1, 30], [1]) if engine != "oracle" else ([13, 1, 30],):
                got = engines.in_pieces(forward, ids[None], pieces)
                assert golden.rms_ratio(got, ref) < bound, (engine, pieces)


@pytest.mark.parametrize("name", ["qwen3, untied", "qwen3, every symbol", "qwen2, gka", "qwen3, gdn alone, own fields"])
def test_long_texts(name: str, tmp_path: Path) -> None:
    """300 tokens on both twins, and one."""
    c = _case(name)
    weights = factory.tensors(c, seed=1)
    out = convert(factory.save(tmp_path / "source", c, weights), tmp_path / "out", dtype="float32")
    for length in (1, 300):
        ids = np.random.default_rng(length).integers(0, factory.V, length)
        ref = factory.logits(c, weights, ids)[None]
        for engine in ("torch", "mlx"):
            with engines.opened(engine, out) as forward:
                bound = KALMANET if "gka" in name else ROUNDING[engine]
                assert golden.rms_ratio(forward(ids[None], None)[0], ref) < bound, (engine, length)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_arrives(name: str, tmp_path: Path) -> None:
    """Back through the table of names, the tensors that are read are those that were stored, bit for bit."""
    c = _case(name)
    weights = factory.tensors(c)
    config, stored = checkpoint.read(
        convert(factory.save(tmp_path / "source", c, weights), tmp_path / "out", dtype="float32")
    )
    table = hmf.table(config)
    rows, back = {row.ours: row for row in table.rows}, {}
    for ours in stored:
        parts = ours.split(".", 2)
        layer = int(parts[1]) if parts[0] == "layers" else None
        row = rows[ours if layer is None else f"layers.{{i}}.{parts[2]}"]
        places = {} if layer is None else table.places(config, layer)
        theirs = row.theirs.format(i=layer, **places)
        back[theirs] = stored[ours][:, None] if row.layout else stored[ours]
    unread = weights.keys() - back.keys()
    assert all(np.array_equal(back[theirs], weights[theirs]) for theirs in back)
    if "nothing reads" in name:
        assert {tensor.split(".", 4)[4] for tensor in unread} == {
            *(f"proj_{x}.linear{y}.weight" for x in "kv" for y in "AB"), "k_rep", "v_rep",
        }  # fmt: skip
    elif name == "qwen3, gka without forgetting":
        assert {tensor.rsplit("gka.")[1] for tensor in unread} == {"a_proj.weight", "A_log", "dt_bias"}
    else:
        assert not unread


def test_windowed(tmp_path: Path) -> None:
    """Full attention with a window of B'MOJO-F's own size and no sinks is the symbol SWA; with sinks it has them."""
    c, ids = factory.config("*-BMF-*"), np.random.default_rng(5).integers(0, factory.V, 67)
    weights = factory.tensors(c)
    source = factory.save(tmp_path / "source", c, weights)
    sliding = {name.replace(".self_attn.", ".swa."): w for name, w in weights.items()}
    ref = factory.logits(factory.config("SWA-BMF-SWA"), sliding, ids)[None]
    out = convert(source, tmp_path / "out", window=factory.W, sinks=0, dtype="float32")
    for engine in engines.NAMES:
        with engines.opened(engine, out) as forward:
            got = engines.in_pieces(forward, ids[None], [13, 1, 30])
            assert golden.rms_ratio(got, ref) < ROUNDING[engine], engine
    config, _ = checkpoint.read(convert(source, tmp_path / "sinks", window=factory.W))
    assert (config.layer_types, config.ssm_layers, config.n_sinks) == (("bmojo",) * 3, (1,), 4)
    assert special_case(config) == (
        "hybrid of 2 sliding-window Transformer with sinks layers, 1 B'MOJO-F with sinks layer"
    )


def test_what_it_says_that_it_is(tmp_path: Path) -> None:
    c = factory.config("*-BMF-SWA-M2-BMF")
    config, _ = checkpoint.read(
        convert(factory.save(tmp_path / "source", c, factory.tensors(c)), tmp_path / "out", dtype="bfloat16")
    )
    assert special_case(config) == (
        "hybrid of 1 Transformer layer, 2 B'MOJO-F layers, 1 sliding-window Transformer layer, 1 Mamba-2 layer"
    )
    assert config.growing_layers == (0,)
    assert (config.window, config.n_fading, config.n_eidetic, config.n_sinks) == (7, 7, 0, 0)


def test_defaults(tmp_path: Path) -> None:
    """What the classes assume where config.json is silent."""
    c = factory.config("BMF-GKA-*")
    c["bmojo_config"] = {"ssm_mixer": "gka"}
    weights = factory.tensors({**c, "bmojo_config": {"ssm_mixer": "gka", "tie_attn_weights": True}})
    for name in ("hidden_act", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "attention_bias"):
        del c[name]
    config, _ = checkpoint.read(convert(factory.save(tmp_path / "source", c, weights), tmp_path / "out"))
    assert (config.window, config.n_fading, config.tie_kv, config.tie_embeddings) == (2048, 2048, True, False)
    assert (config.norm_eps, config.rope_theta) == (1e-6, 10_000.0)
    ssm = config.ssm_of(0)
    assert ssm is not None
    assert (ssm.kind, ssm.num_iter, ssm.ridge_strength, ssm.norm_eps, ssm.d_conv) == ("gka", 30, 0.02, 1e-6, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            ({"hybrid_override_pattern": f"*-{symbol}"}, "hybrid_override_pattern: .* is a stage of training")
            for symbol in ("*DA", "BMF*", "M2*", "GDN*", "GKA*", "SWA*", "GDN>GKA")
        ),
        ({"hybrid_override_pattern": "*-X"}, r"hybrid_override_pattern: 'X' is not one of \*, SWA, BMF"),
        ({"hybrid_override_pattern": "*-*-*"}, "hybrid_override_pattern lists 3 layers, num_hidden_layers is 2"),
        ({"hybrid_override_pattern": None}, "hybrid_override_pattern is missing"),
        ({"mamba2_config": {"use_pos_emb": True}}, r"mamba2_config\.use_pos_emb"),
        ({"mamba2_config": {"new": True}}, r"mamba2_config\.new is not supported"),
        ({"mamba2_config": {"ssm_cfg": {"repeat_kv_before_conv": True}}}, "ssm_cfg.repeat_kv_before_conv True"),
        ({"mamba2_config": {"ssm_cfg": {"d_state": 128}}}, r"mamba2_config\.ssm_cfg\.d_state 128 .* must be 6"),
        ({"mamba2_config": {"xb_proj_rank": 8}}, r"mamba2_config\.xb_proj_rank 8"),
        ({"bmojo_config": {"ssm_mixer": "gka"}, "gka_config": {"num_k_heads": 4}}, r"num_k_heads 4 .* must be 2"),
        ({"mamba2_config": 3}, "mamba2_config must be a table"),
        ({"bmojo_config": {"ssm_mixer": "rwkv"}}, r"bmojo_config\.ssm_mixer 'rwkv'"),
        ({"bmojo_config": {"window_size": 0}}, "window: must be at least 1"),
        ({"bmojo_config": {"ssm_mixer": "gka"}, "gka_config": {"solver_type": "cg"}}, r"gka_config\.solver_type 'cg'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"linear_num_key_heads": 2}, "linear_num_key_heads"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"model_type": "hybrid_llama", "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "hybrid_qwen2", "attention_bias": False}, "attention_bias"),
        ({"model_type": "hybrid_llama"}, "left over"),
        ({"model_type": "hybrid_qwen2"}, r"tensor 'model\.layers\.0\.self_attn\.q_proj\.bias' is missing"),
        ({"hybrid_override_pattern": "*-SWA"}, r"swa_config\.window_size is missing"),
        ({"bmojo_config": {"tie_attn_weights": False}}, r"tensor '.*_proj_\.weight' is missing"),
    ],
)
def test_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    c = factory.config("*-BMF")
    source = factory.save(tmp_path / "source", c, factory.tensors(c))
    if fields == {"model_type": "hybrid_qwen2"}:
        del c["attention_bias"]  # a field its class does not have
    (source / "config.json").write_text(json.dumps({**c, **fields}))
    with pytest.raises(checkpoint.CheckpointError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tables_that_conflict(tmp_path: Path) -> None:
    """gdn and gka share one table here: an option that differs is refused by name, two defaults may differ."""
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"gdn_config": {"conv_size": 3}}, "d_conv differs .3 in gdn, 4 in gka"),
        ({"gka_config": {"norm_eps": 1e-4}}, "norm_eps differs"),
        ({"gka_config": {"use_gate": False}, "gdn_config": {"use_gate": True}}, "use_gate differs"),
    )
    for given, message in cases:
        c = factory.config("GDN-GKA", **given)
        source = factory.save(tmp_path / message[:4], c, factory.tensors(c))
        with pytest.raises(checkpoint.CheckpointError, match=message):
            convert(source, tmp_path / "out")
