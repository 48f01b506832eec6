"""`to_mlxfn`: a model folder into one file of MLX functions with constant-size state, for C++, Swift and Python.

The functions are those of bmojo_edge/mlx/fixed.py, with the weights inside. bmojo_edge/mlx/mlxfn_runner.py runs them;
docs/export.md describes the folder for other programs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from bmojo_convert.export_folder import (
    MANIFEST,
    ExportError,
    Target,
    check_exportable,
    exported_folder,
    record_self_test,
)
from bmojo_edge import checkpoint, hub
from bmojo_edge.engine import weights_fingerprint
from bmojo_edge.mlx import load
from bmojo_edge.mlx.fixed import commit, committing, decode, prefill
from bmojo_edge.mlx.model import Model
from bmojo_edge.mlx.ops import exported
from bmojo_edge.state import leaves, map_leaves, state_spec
from bmojo_edge.tensors import write_text

FUNCTIONS = "model.mlxfn"
TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.2}  # RMS ratio of what was written to the model

Progress = Callable[[str, int, int], None]


def to_mlxfn(model: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None) -> Path:
    """Export a model folder (or hub id) as MLX functions and return the folder written.

    They run on the kind of device they were made on, MLX's default device. overwrite: replace `out` if it is an export
    of ours. progress is called with (stage, done, total); the stages are the functions' names and "check". The folder
    appears whole, and only if what was written gives the model's logits.
    Raises ExportError naming the layer or the file, CheckpointError for a model folder, OSError on a full disk.
    """
    source = hub.locate(model)
    check_exportable(checkpoint.read(source)[0])
    with exported_folder(Path(out), Target.mlxfn, overwrite) as folder:
        lm = load(source)
        described = _write(folder / FUNCTIONS, lm, progress)
        if lm.tokenizer is not None:
            lm.tokenizer.save(folder)
        found = json.dumps(manifest(lm, described), indent=1) + "\n"
        write_text(folder / MANIFEST, found)
        _tell(progress, "check", 0)
        record_self_test(folder, lm.config, 2 * lm.config.chunk_size + 3, lambda tokens, at: _forward(lm, tokens)[at])
        _check(folder, lm)
        _tell(progress, "check", 1)
    return Path(out)


def _tell(progress: Progress | None, stage: str, done: int) -> None:
    if progress is not None:
        progress(stage, done, 1)


def _forward(lm: Model, tokens: np.ndarray) -> np.ndarray:
    return np.array(lm(tokens)[0][0].astype(mx.float32))


def _write(path: Path, lm: Model, progress: Progress | None) -> dict[str, Any]:
    """Write the functions to one file, where weights are stored once for all; what the manifest says of each."""
    spec = state_spec(lm.config, 1)
    names = [name for name, _ in leaves(spec)]
    chunk = lm.config.chunk_size

    def function(*arrays: mx.array) -> tuple[mx.array, ...]:
        """Which of the functions is meant, the arguments' shapes say: traces of a file are told apart by them."""
        given = iter(arrays[len(arrays) - len(names) :])
        state = map_leaves(lambda _: next(given), spec)
        if len(arrays) == len(names):
            return tuple(x for _, x in leaves(commit(lm, state)))
        tokens = arrays[0]
        logits, state = decode(lm, tokens, state) if tokens.shape[1] == 1 else prefill(lm, tokens, state)
        return logits.astype(mx.float32), *(x for _, x in leaves(state))

    sizes = {"decode": 1} | ({"prefill": chunk} if chunk > 1 else {}) | ({"commit": 0} if committing(lm) else {})
    state, described = [x for _, x in leaves(lm.init_state())], {}
    mx.eval(lm.parameters(), state)
    try:
        with exported(), mx.exporter(str(path), function) as export:
            for name, size in sizes.items():
                _tell(progress, name, 0)
                export(*([mx.zeros((1, size), mx.int32)] if size else []), *state)
                described[name] = {"tokens": [1, size] if size else None, "logits": bool(size)}
                _tell(progress, name, 1)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"{path.name}: MLX cannot write this model's functions ({error})") from None
    return described


def manifest(lm: Model, described: dict[str, Any]) -> dict[str, Any]:
    """What a program needs to know besides the functions (docs/export.md)."""
    config = lm.config
    state = [
        {"name": name, "shape": list(leaf.shape), "dtype": leaf.dtype, "fill": leaf.fill}
        for name, leaf in leaves(state_spec(config, 1))
    ]
    return {
        "format": Target.mlxfn.value,
        "version": 1,
        "mlx": mx.__version__,  # pyright: ignore[reportAttributeAccessIssue]
        "device": "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu",
        "file": FUNCTIONS,
        "weights": weights_fingerprint(lm),
        "vocab_size": config.vocab_size,
        "chunk": config.chunk_size,
        "eos": [] if lm.tokenizer is None else sorted(lm.tokenizer.eos_ids),
        "functions": described,
        "state": state,
        "config": config.to_dict(),
    }


def _check(folder: Path, lm: Model) -> None:
    """Run what was written on the self-test's tokens: it must give the model's logits."""
    from bmojo_edge.mlx.mlxfn_runner import MlxfnModel

    try:
        error = MlxfnModel.load(folder).self_test()
    except RuntimeError as failure:  # MLX's own, of a file that was cut off
        raise ExportError(f"{folder.name}: MLX cannot run what was written ({failure})") from None
    if not error < TOLERANCE[lm.config.dtype]:
        raise ExportError(f"{folder.name}: the functions give other logits than the model, RMS ratio {error:.1e}")
