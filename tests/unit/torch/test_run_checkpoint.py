"""Checkpoints of a run: whole or not at all, the latest kept, damage named, nothing unpickled."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from bmojo_edge.tensors import CheckpointError
from bmojo_edge.torch import run_checkpoint
from bmojo_edge.torch.run_checkpoint import INFO, RunCheckpoints


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(5, 3),
        "half": torch.randn(4).bfloat16(),
        "count": torch.tensor([7]),
        "empty": torch.zeros(2, 0),
        "long": torch.tensor([2**40 + 1, -1]),
    }


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    saved, checkpoints = tensors(), RunCheckpoints(tmp_path, keep=2)
    given = {name: x.clone() for name, x in saved.items()}
    checkpoints.save(3, given, {"tokens": 99})
    for x in given.values():
        x.zero_()  # the copy was taken before `save` returned
    checkpoints.wait()
    assert checkpoints.info(3)["tokens"] == 99
    assert checkpoints.shapes(3) == {name: tuple(x.shape) for name, x in saved.items()}
    loaded = {name: torch.full_like(x, 5) for name, x in saved.items()}
    checkpoints.load(3, loaded)
    for name, x in saved.items():
        torch.testing.assert_close(loaded[name], x, rtol=0, atol=0, msg=name)


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    checkpoints.save(1, tensors(), {})
    checkpoints.wait()
    names = sorted(path.name for path in checkpoints.path(1).iterdir())
    assert names[0] == INFO and all(name.endswith(".safetensors") for name in names[1:])
    for name in names[1:]:
        with safe_open(checkpoints.path(1) / name, framework="pt") as file:
            assert file.keys()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for module, function in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, function, refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    checkpoints.load(1, tensors())


def test_the_latest_are_kept(tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    for step in (1, 2, 30, 4000):
        checkpoints.save(step, tensors(), {})
    checkpoints.wait()
    assert checkpoints.steps() == [30, 4000]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000030", "step-00004000"}


def test_a_save_that_fails_leaves_no_checkpoint_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, tensors(), {})
    checkpoints.wait()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(run_checkpoint, "_flush", full)
    checkpoints.save(2, tensors(), {})
    with pytest.raises(CheckpointError, match=r"the last checkpoint was not written: .*No space left"):
        checkpoints.wait()
    assert checkpoints.steps() == [1]
    checkpoints.load(1, tensors())
    checkpoints.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_damage_is_named(tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, tensors(), {})
    checkpoints.wait()
    (file,) = checkpoints.path(1).glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"step-00000001/.*safetensors: missing or truncated; remove"):
        checkpoints.info(1)
    file.write_bytes(whole[:9] + b"\xff" + whole[10:])
    with pytest.raises(CheckpointError, match=r"step-00000001: damaged .*; remove it"):
        checkpoints.load(1, {"a": torch.zeros(5, 4)})
    file.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"tensor 'other' is missing"):
        checkpoints.load(1, {"other": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"tensor 'a' has shape \(5, 3\), needed is \(5, 4\)"):
        checkpoints.load(1, {"a": torch.zeros(5, 4)})
    info = checkpoints.path(1) / INFO
    info.write_text(json.dumps({**json.loads(info.read_text()), "version": 2}))
    with pytest.raises(CheckpointError, match="version 1"):
        checkpoints.info(1)
