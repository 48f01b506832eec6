"""The twins are twins: the same files, public names and parameters, and a state of one goes on in the other."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bmojo_edge
from bmojo_edge.state import leaves, map_leaves
from tests.helpers import GRID, assert_close, assert_states_close, random_tokens, random_weights, to_numpy

ROOT = Path(bmojo_edge.__file__).parent

# What only one twin has, and why. Anything else in one must be in the other.
ONLY_MLX = {
    # The step runs apart from what the host decides before it, so that it can be compiled.
    "decode.py": {"Decoder", "TRACES", "run_step"},
    "layout.py": {"LIVE_STEP", "live_slots", "as_mask"},
    "memory.py": {"slots_seen"},
    "mixers/attention.py": {"grown"},
    "model.py": {"integers"},
    # Quantised weights run as they are; PyTorch's twin dequantises them.
    "layers.py": {"QuantizedExpertLinear", "linear", "linear_wide", "stored", "apply"},
    "ops.py": {"swiglu"},
    "load.py": {"as_array"},
    "recalled.py": {"with_recalled"},
}
ONLY_TORCH = {
    # Packed documents are for training.
    "layout.py": {"Segments", "segments_of", "growth_of", "overwritten", "last_values", "is_aligned", "fresh_state"},
    # float64 for checking gradients; linear layers are plain functions of their weights.
    "ops.py": {"causal_conv", "SCAN_STEPS", "on_gpu", "Grid", "gated_scan", "why_plain"},
    # PyTorch is told where to put a model.
    "load.py": {"as_tensor", "check_device"},
    # What layers have in common of storage once a call, for a GPU waits for every call from Python; blocks it scores.
    "recalled.py": {"AT_ONCE", "recalled_columns", "recalled_positions", "shared", "scores_of_blocks"},
}


def files(twin: str) -> set[str]:
    return {path.relative_to(ROOT / twin).as_posix() for path in (ROOT / twin).rglob("*.py")}


def public_names(path: Path) -> tuple[set[str], set[str]]:
    """Classes, functions and constants at the top of a module, and names it passes on (`import X as X`)."""
    own: set[str] = set()
    passed: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            passed |= {alias.name for alias in node.names if alias.asname == alias.name}
        elif isinstance(node, ast.Assign):
            own |= {target.id for target in node.targets if isinstance(target, ast.Name) and target.id.isupper()}
    return {name for name in own if not name.startswith("_")}, passed


def test_files_mirror() -> None:
    # What trains (train, data, distill ...) is PyTorch's alone; what mlx-lm runs and .mlxfn files hold is MLX's.
    exports = {"fixed.py", "chunk_layout.py", "mlxfn_runner.py"}
    assert files("mlx") - files("torch") == {"decode.py", "bmojo_model.py", "mlx_lm_engine.py", *exports}
    assert {name for name in files("torch") if "/" in name} == {name for name in files("mlx") if "/" in name}


@pytest.mark.parametrize("file", sorted(files("mlx") & files("torch")))
def test_names_mirror(file: str) -> None:
    (ours, from_metal), (theirs, from_cuda) = (public_names(ROOT / twin / file) for twin in ("mlx", "torch"))
    # Kernels may be cut differently, so a name from a kernel package need not be in the other twin.
    assert ours - theirs - from_cuda == ONLY_MLX.get(file, set())
    assert theirs - ours - from_metal == ONLY_TORCH.get(file, set())


@pytest.mark.parametrize("name", ["all", "untied, qk-norm, bias", "norms in the ssm", "mixed", "experts"])
def test_parameters_mirror(name: str) -> None:
    pytest.importorskip("mlx.core")
    pytest.importorskip("torch")
    from mlx.utils import tree_flatten

    from bmojo_edge.mlx import Model as MLXModel
    from bmojo_edge.torch import Model as TorchModel

    config = GRID[name]
    ours: Any = tree_flatten(MLXModel(config).parameters())
    theirs = TorchModel(config).state_dict()
    assert {key: tuple(p.shape) for key, p in ours} == {key: tuple(p.shape) for key, p in theirs.items()}


@pytest.mark.parametrize("name", ["all", "mixed", "no ssm", "untied, qk-norm, bias"])
def test_a_state_goes_on_in_the_other_twin(name: str) -> None:
    """A prompt read by one twin, continued by the other, is a prompt continued by the first."""
    mx, torch = pytest.importorskip("mlx.core"), pytest.importorskip("torch")
    from bmojo_edge.mlx import Model as MLXModel
    from bmojo_edge.mlx import load_weights as load_mlx
    from bmojo_edge.torch import Model as TorchModel
    from bmojo_edge.torch import load_weights as load_torch

    config = GRID[name]
    weights, tokens = random_weights(config), random_tokens(config, 2, 50)
    ours, theirs = load_mlx(MLXModel(config), weights), load_torch(TorchModel(config), weights).eval()
    a, our_state = ours.prefill(tokens[:, :31], ours.init_state(2), [31, 12])
    b, their_state = theirs.prefill(tokens[:, :31], theirs.init_state(2), [31, 12])
    assert_close(a, to_numpy(b), 2e-6)
    assert [leaf for leaf, _ in leaves(our_state)] == [leaf for leaf, _ in leaves(their_state)]
    moved_in = map_leaves(lambda x: mx.array(x.numpy()), their_state)
    moved_out = map_leaves(lambda x: torch.from_numpy(np.array(x)), our_state)
    for token in tokens[:, 31:].T:
        a, moved_in = ours.decode_one_token(token, moved_in)
        b, moved_out = theirs.decode_one_token(token, moved_out)
        assert_close(a, to_numpy(b), 1e-5)
    assert_states_close(moved_in, map_leaves(to_numpy, moved_out), 1e-5)
