"""What a decoded token costs: the counting itself, and that it gets no worse than metal_kernels/cost.json says."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")

from bmojo_edge.config import Config  # noqa: E402
from bmojo_edge.parameters import parameter_count  # noqa: E402
from bmojo_edge.presets import PRESETS  # noqa: E402
from bmojo_edge.state import leaves  # noqa: E402
from metal_kernels import cost  # noqa: E402

FIELDS: dict[str, Any] = {**PRESETS["tiny"], "layer_types": ("bmojo",), "n_sinks": 4}


@pytest.fixture(autouse=True)
def compiling() -> Iterator[None]:
    """The trace switches compilation on; others expect it as it was."""
    yield
    if os.environ.get("MLX_DISABLE_COMPILE"):
        mx.disable_compile()


def test_kernels_are_counted_once_and_save_launches() -> None:
    model = cost.model_of(Config(**FIELDS), None)
    plain, kernels = cost.traced(model, False), cost.traced(model, True)
    assert plain.launches == []
    assert {launch.kernel for launch in kernels.launches} >= {"selective_scan_step", "memory_attention_step"}
    assert kernels.dispatches[cost.KERNEL] == len(kernels.launches)
    assert kernels.dispatches.total() < plain.dispatches.total()
    # Two in the block, one before the head; those after a sum are one kernel with it.
    assert plain.dispatches[cost.NORM] == 3
    assert kernels.dispatches[cost.NORM] == 1
    assert [launch.kernel for launch in kernels.launches].count("add_rms_norm") == 2


def test_an_operation_more_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cost.model_of(Config(**FIELDS), None)
    before = cost.traced(model, True)
    head = type(model).head
    monkeypatch.setattr(type(model), "head", lambda self, hidden: mx.cumsum(head(self, hidden), axis=-1))
    after = cost.traced(model, True)
    assert after.dispatches - before.dispatches == Counter(["CumSum"])
    assert cost.bytes_moved(model, after) - cost.bytes_moved(model, before) == 2 * 4 * model.config.vocab_size


def test_what_must_be_read_and_written() -> None:
    config = Config(**FIELDS)
    model = cost.model_of(config, None)
    read, written = cost.state_required(model)
    sizes = {name: x.nbytes for name, x in leaves(model.init_state(1).layers)}
    kept = sizes["0.ssm.ssm"] + sizes["0.ssm.conv"] + sizes["0.history"]
    slot = 4 * config.kv_heads * config.d_head
    slots = config.window + config.fading + config.n_sinks + config.n_eidetic
    assert read == 2 * slot * slots + 8 * config.n_eidetic + kept  # with the positions of the eidetic set
    assert written == 4 * slot + 4 + kept
    assert cost.parameters_read(model) == 4 * parameter_count(config)


@pytest.mark.parametrize("weights", ["float16", "4 bits"])
def test_no_more_launches_and_bytes_than_written_down(weights: str) -> None:
    recorded = json.loads((cost.HERE / "cost.json").read_text())["rows"]
    old = next(row for row in recorded if row["weights"] == weights)["kernels"]
    new = cost.row(weights)["kernels"]
    for name in ("outside_products_and_norms", "outside_products_and_norms_with_rope"):
        assert new[name] <= cost.LAUNCHES_ALLOWED
    assert new["moved_to_required"] <= cost.BYTES_ALLOWED
    assert new["outside_products_and_norms"] <= old["outside_products_and_norms"]
    assert new["moved_to_required"] <= old["moved_to_required"] + 1e-3
