"""Every row of the table of special cases, and mixtures of them, by name."""

from __future__ import annotations

from typing import Any

import pytest

from bmojo_edge.config import Config
from bmojo_edge.special_cases import special_case

ATTENTION: dict[str, Any] = {"layer_types": ("attention", "attention"), "ssm": None, "n_eidetic": 0}
WINDOWED: dict[str, Any] = {"ssm": None, "n_eidetic": 0}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "B'MOJO"),
        ({"n_eidetic": 0}, "B'MOJO-F"),
        ({"n_sinks": 4}, "B'MOJO with sinks"),
        ({"n_fading": 0}, "B'MOJO without fading tokens"),
        ({"n_fading": 0, "n_eidetic": 0}, "sliding-window Transformer"),
        (ATTENTION, "Transformer"),
        (ATTENTION | {"attention_window": 8}, "sliding-window Transformer"),
        (
            ATTENTION | {"attention_window": (None, 8)},
            "hybrid of 1 Transformer layer, 1 sliding-window Transformer layer",
        ),
        (WINDOWED, "sliding-window Transformer"),
        (WINDOWED | {"n_sinks": 4}, "sliding-window Transformer with sinks"),
        (WINDOWED | {"n_eidetic": 4}, "sliding-window Transformer with eidetic memory"),
        (WINDOWED | {"n_eidetic": 4, "n_sinks": 1}, "sliding-window Transformer with sinks and eidetic memory"),
        ({"layer_types": ("mamba", "mamba")}, "Mamba"),
        ({"layer_types": ("mamba", "attention", "mamba")}, "hybrid of 2 Mamba layers, 1 Transformer layer"),
        ({"layer_types": ("bmojo", "attention")}, "hybrid of 1 B'MOJO layer, 1 Transformer layer"),
    ],
)
def test_names(fields: dict[str, Any], name: str) -> None:
    assert special_case(Config.preset("tiny", **fields)) == name


@pytest.mark.parametrize("kind", ["mamba2", "gdn", "gka"])
def test_every_ssm_has_a_name(kind: str) -> None:
    config = Config.preset("tiny", layer_types=(kind, kind), ssm=None, n_fading=0, n_eidetic=0)
    assert special_case(config) not in ("", kind)
