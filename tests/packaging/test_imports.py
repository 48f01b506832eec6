"""`import bmojo_edge` is light, and each engine works where the other is not installed.

Every case runs in a Python of its own, in which the named packages are not to be found.
"""

import os
import subprocess
import sys
from collections.abc import Set
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOTS = [str(ROOT / folder) for folder in (".", "metal_kernels", "cuda_kernels", "converters")]

ABSENT = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""
MLX_SIDE = {"mlx", "mlx_lm"}
TORCH_SIDE = {"torch", "triton", "transformers"}
NEUTRAL = [f"bmojo_edge.{name}" for name in ("config", "reference", "checkpoint", "tokenizer", "generate", "session")]


def run(code: str, absent: Set[str] = frozenset(), cwd: Path = ROOT) -> str:
    """What `code` prints in a new Python without the packages in `absent`; fails the test with its error."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(ROOTS)}
    command = [sys.executable, "-W", "error::ImportWarning", "-c", ABSENT.format(absent=set(absent)) + code]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", sorted(MLX_SIDE | TORCH_SIDE - {"triton"}))
def test_the_blocker_hides_a_package(package: str) -> None:
    code = f"import importlib.util; print(importlib.util.find_spec({package!r}))"
    assert run(code).strip() != "None"
    assert run(code, {package}).strip() == "None"


def test_import_is_light() -> None:
    code = "import bmojo_edge, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(run(code).split())
    assert "bmojo_edge" in loaded
    assert not loaded & {"mlx", "torch", "typer", "rich", "numpy", "transformers", "huggingface_hub", "tokenizers"}


@pytest.mark.parametrize("module", NEUTRAL)
def test_neutral_modules_need_no_engine(module: str) -> None:
    run(f"import {module}, sys; assert {module!r} in sys.modules", MLX_SIDE | TORCH_SIDE | {"typer"})


@pytest.mark.parametrize("module", ["bmojo_edge.torch", "bmojo_cuda"])
def test_torch_side_imports_without_mlx(module: str) -> None:
    run(f"import {module}, sys; assert {module!r} in sys.modules", MLX_SIDE | {"triton"})


@pytest.mark.parametrize("module", ["bmojo_edge.mlx", "bmojo_metal"])
def test_mlx_side_imports_without_torch(module: str) -> None:
    run(f"import {module}, sys; assert 'bmojo_edge.torch' not in sys.modules", TORCH_SIDE | {"typer"})


def test_torch_twin_runs_without_mlx() -> None:
    code = """
import torch
import bmojo_edge as be
from bmojo_edge.torch import Model
config = be.Config.preset("tiny")
tokens = torch.arange(80).view(2, 40)
logits, state = Model(config)(tokens)
print(*logits.shape, bool(torch.isfinite(logits).all()))
"""
    assert run(code, MLX_SIDE).split() == ["2", "40", "256", "True"]


def test_mlx_twin_generates_without_torch(model: Path) -> None:
    code = """
import bmojo_edge as be
print(*(token.id for token in be.stream(be.load("path/to/model"), "Once upon a time", max_tokens=5)))
"""
    assert run(code, TORCH_SIDE | {"typer"}, cwd=model.parents[2]).split()


@pytest.mark.parametrize("module", ["bmojo_convert", "bmojo_convert.default", "bmojo_edge.cli"])
def test_converters_and_command_line_import_no_engine(module: str) -> None:
    run(f"import {module}, sys; assert {module!r} in sys.modules", MLX_SIDE | TORCH_SIDE)


@pytest.mark.parametrize("first", ["import bmojo_edge.generate", "import bmojo_edge.session", "be.stream", "pass"])
def test_generate_is_the_function_whatever_was_imported_first(first: str) -> None:
    code = f"""
import bmojo_edge as be
{first}
from bmojo_edge import generate
from bmojo_edge.generate import generate as defined, stream
assert generate is defined is be.generate, generate
assert be.stream is stream
from bmojo_edge.generate import Token
assert be.Token is Token and be.generate is defined
"""
    run(code)


def test_public_names_resolve_and_unknown_ones_do_not() -> None:
    code = """
import bmojo_edge as be
assert set(be.__all__) <= set(dir(be))
for name in be.__all__:
    assert getattr(be, name).__name__.rpartition(".")[2] == name, name
assert issubclass(be.CheckpointError, Exception)
try:
    be.no_such_name
except AttributeError as error:
    print(error)
"""
    assert run(code).strip() == "module 'bmojo_edge' has no attribute 'no_such_name'"
