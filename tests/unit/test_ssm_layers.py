"""`ssm_layers`: bmojo layers with and without an SSM in one model."""

from __future__ import annotations

from typing import Any

import pytest

from bmojo_edge.config import Config, ConfigError
from bmojo_edge.parameters import parameter_shapes
from bmojo_edge.special_cases import special_case
from bmojo_edge.state import leaves, state_spec
from tests.helpers import odd


def test_a_layer_without_an_ssm_has_no_fading_memory() -> None:
    """Layer by layer, parameters, state and name are those of the same layer in a model of its kind alone."""
    config = odd("bmojo", "bmojo", "mamba", ssm_layers=[1], tie_kv=False)
    assert config.ssm_layers == (1,)
    assert [config.ssm_of(i) is None for i in range(3)] == [True, False, False]
    assert [config.fading_of(i) for i in range(2)] == [0, 3]
    assert [config.signal_of(i) for i in range(2)] == ["input", "ssm_output"]
    alone = {0: odd("bmojo", ssm=None, tie_kv=False), 1: odd("bmojo", tie_kv=False)}
    shapes, spec = parameter_shapes(config), state_spec(config)
    for i, other in alone.items():
        ours = {name.split(".", 2)[2]: shape for name, shape in shapes.items() if name.startswith(f"layers.{i}.")}
        theirs = parameter_shapes(other).items()
        assert ours == {name.split(".", 2)[2]: shape for name, shape in theirs if name.startswith("layers.0.")}
        assert dict(leaves(spec.layers[i])) == dict(leaves(state_spec(other).layers[0]))
    assert special_case(config) == (
        "hybrid of 1 sliding-window Transformer with sinks and eidetic memory layer, 1 B'MOJO with sinks layer, "
        "1 Mamba layer"
    )


def test_json_and_spelling() -> None:
    """It survives JSON; listing every bmojo layer is the same as null."""
    config = odd("bmojo", "mamba", "bmojo", ssm_layers=(2,))
    assert Config.from_json(config.to_json()) == config
    assert config.to_dict()["ssm_layers"] == [2]
    assert odd("bmojo", "mamba", "bmojo", ssm_layers=(2, 0)) == odd("bmojo", "mamba", "bmojo")
    assert odd(ssm=None, ssm_layers=()) == odd(ssm=None)
    assert "ssm_layers" not in {k: v for k, v in odd().to_dict().items() if v is not None}
    empty = odd("mamba", "bmojo", ssm_layers=(), n_fading=None)
    assert (empty.ssm_layers, empty.n_fading) == ((), 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ssm_layers": [2]}, "ssm_layers: names layer 2, which is not a bmojo layer"),
        ({"ssm_layers": [3]}, "ssm_layers: names layer 3, which is not a bmojo layer"),
        ({"ssm_layers": [-1]}, "ssm_layers"),
        ({"ssm_layers": ["0"]}, "ssm_layers"),
        ({"ssm_layers": "01"}, "ssm_layers: must be a list"),
        ({"ssm_layers": 1}, "ssm_layers: must be a list"),
        ({"ssm_layers": []}, "n_fading: must be 0 where ssm_layers is empty"),
        ({"ssm_layers": [], "n_fading": 0, "innovation": {"signal": "ssm_output"}}, "innovation.signal"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        odd("bmojo", "bmojo", "mamba", **fields)
    if fields["ssm_layers"] == [2]:
        with pytest.raises(ConfigError, match="ssm_layers: names layers but ssm is null"):
            odd("bmojo", ssm=None, ssm_layers=[0])
