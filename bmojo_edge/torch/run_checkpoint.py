"""Checkpoints of a run: torch.distributed.checkpoint on safetensors files, in the background, whole or not at all.

A checkpoint is a folder of named tensors and a little JSON; no pickle is written or read. It is written under a
temporary name, flushed to the disk, then renamed. Tensors may be sharded otherwise when they are loaded. Nothing here
knows what the tensors mean.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from bmojo_edge.tensors import CheckpointError, read_json

FORMAT, VERSION = "bmojo-run", 1
INFO = "checkpoint.json"
_PREFIX, _PARTIAL = "step-", ".partial-"


class _Writer(HuggingFaceStorageWriter):
    """Every process writes its part; when all are done, the one that coordinates calls `done`."""

    def __init__(self, folder: Path, done: Callable[[], None]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._done = done

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        self._done()


class RunCheckpoints:
    """The latest `keep` checkpoints in a folder, named by step; one process or all of a group use it together."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._pending: Future[Any] | None = None
        # Saving talks between processes from its own thread, so it needs a group of its own.
        group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._group = group if isinstance(group, dist.ProcessGroup) else None

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, ascending."""
        names = [path.name for path in self.folder.glob(f"{_PREFIX}*")] if self.folder.is_dir() else []
        return sorted(int(name.removeprefix(_PREFIX)) for name in names if name.removeprefix(_PREFIX).isdigit())

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def clean(self) -> None:
        """Remove what a process that was killed left unfinished or half removed; for one process, before any saves."""
        for partial in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(partial)

    def save(self, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Copy the tensors and write them in the background; waits for a save that is still under way.

        Raises CheckpointError telling what went wrong in that one.
        """
        self.wait()
        target, partial = self.path(step), self.folder / f"{_PARTIAL}{step:08d}"
        _expect_no_group()
        writer = _Writer(partial, lambda: self._complete(partial, target, {**info, "step": step}))
        saving = state_dict_saver.async_save(
            dict(tensors), storage_writer=writer, process_group=self._group, no_dist=self._group is None
        )
        assert isinstance(saving, Future)
        self._pending = saving

    def wait(self) -> None:
        """Until the last save is on the disk; raises CheckpointError telling what went wrong in it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except CheckpointException as error:
                raise CheckpointError(f"{self.folder}: the last checkpoint was not written: {_first(error)}") from None

    def _complete(self, partial: Path, target: Path, info: dict[str, Any]) -> None:
        files = sorted(partial.iterdir())
        content = {
            "format": FORMAT,
            "version": VERSION,
            **info,
            "files": {file.name: file.stat().st_size for file in files},
        }
        (partial / INFO).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path in (*files, partial / INFO, partial):
            _flush(path)
        partial.rename(target)
        _flush(self.folder)
        for step in self.steps()[: -self.keep]:
            unnamed = self.folder / f"{_PARTIAL}old-{step:08d}"
            self.path(step).rename(unnamed)  # first, so that no half of it is taken for a checkpoint
            shutil.rmtree(unnamed)

    def info(self, step: int) -> dict[str, Any]:
        """The JSON of a checkpoint. Raises CheckpointError naming a file that is missing or damaged."""
        folder = self.path(step)
        content = read_json(folder / INFO)
        if content.get("format") != FORMAT or content.get("version") != VERSION:
            raise CheckpointError(f"{folder / INFO}: is not of format {FORMAT}, version {VERSION}")
        for name, size in content.get("files", {}).items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise CheckpointError(
                    f"{path}: missing or truncated; remove {folder} to go on from the checkpoint before it"
                )
        return content

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors in a checkpoint. Raises CheckpointError where they cannot be read."""
        folder = self.path(step)
        try:
            metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder}: damaged ({error}); remove it to go on from the one before it") from None
        return {name: tuple(stored.size) for name, stored in metadata.state_dict_metadata.items()}  # pyright: ignore

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill the tensors from a checkpoint, each process the parts it holds.

        Raises CheckpointError naming a tensor that the checkpoint does not have in that shape.
        """
        stored = self.shapes(step)
        for name, tensor in tensors.items():
            if stored.get(name) != tuple(tensor.shape):
                found = "is missing" if name not in stored else f"has shape {stored[name]}"
                raise CheckpointError(f"{self.path(step)}: tensor {name!r} {found}, needed is {tuple(tensor.shape)}")
        _expect_no_group()
        reader = HuggingFaceStorageReader(str(self.path(step)))
        try:
            state_dict_loader.load(
                dict(tensors), storage_reader=reader, process_group=self._group, no_dist=self._group is None
            )
        except CheckpointException as error:
            raise CheckpointError(f"{self.path(step)}: cannot be read: {_first(error)}") from None


def _first(error: CheckpointException) -> BaseException:
    """What went wrong in the first process that failed."""
    return next(iter(error.failures.values()))[0]


def _expect_no_group() -> None:
    """One process is no mistake: keep PyTorch from warning of it, in whichever thread."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
