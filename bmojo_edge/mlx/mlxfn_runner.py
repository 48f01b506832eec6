"""Runs an export of MLX functions: what a program in C++ or Swift does with the manifest, in Python.

`MlxfnModel` has the face of `engine.LM`, so `be.stream`, `be.generate` and `Session` take it; one sequence at a time.
It knows the folder of docs/export.md and nothing of the model that was exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file

from bmojo_edge import tokenizer
from bmojo_edge.config import Config, ConfigError
from bmojo_edge.state import Leaf, State, leaves, map_leaves, state_spec
from bmojo_edge.tensors import CheckpointError, read_json
from bmojo_edge.tokenizer import Tokenizer

FORMAT, VERSION = "bmojo-edge mlxfn", 1
MANIFEST, SELF_TEST = "manifest.json", "self_test.safetensors"


class MlxfnModel:
    """An exported model. Logits and states are MLX arrays; a call leaves the state it was given as it was."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], config: Config, function: Any) -> None:
        self.folder, self.manifest, self.config = folder, manifest, config
        self.tokenizer: Tokenizer | None = None
        self.fingerprint: str = manifest["weights"]
        self._function = function
        self._spec = state_spec(config, 1)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open an export folder. Raises CheckpointError naming the file and what is wrong with it."""
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(f"{folder / MANIFEST}: file is missing, so this is no export")
        manifest = read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            found = f"{manifest.get('format')!r} version {manifest.get('version')!r}"
            raise CheckpointError(f"{folder / MANIFEST}: is {found}, this program reads {FORMAT!r} version {VERSION}")
        here = mx.__version__  # pyright: ignore[reportAttributeAccessIssue]
        try:
            config, file, made = Config.from_json(manifest["config"]), folder / manifest["file"], manifest["mlx"]
            _check_version(folder, made, here)
            if manifest["device"] == "gpu" and not mx.metal.is_available():
                raise CheckpointError(f"{file}: was made on a GPU and runs on one alone; export it again here")
        except (ConfigError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / MANIFEST}: {error}") from None
        if not file.is_file():
            raise CheckpointError(f"{file}: file is missing")
        try:
            function = mx.import_function(str(file))
        except (RuntimeError, ValueError, MemoryError) as error:
            raise CheckpointError(f"{file}: MLX {here} cannot read it ({error}); it was made with {made}") from None
        model = cls(folder, manifest, config, function)
        if any((folder / name).is_file() for name in tokenizer.FILES):
            model.tokenizer = Tokenizer.load(folder)
        return model

    # --- the face of engine.LM ----------------------------------------------------------------------------------------

    def init_state(self, batch: int = 1, offset: int = 0) -> State:
        """A fresh state, every array filled with its `fill`."""
        if batch != 1:
            raise ValueError(f"batch: an exported model runs one sequence at a time, got {batch}")

        def fresh(leaf: Leaf) -> mx.array:
            return mx.full(leaf.shape, leaf.fill, getattr(mx, leaf.dtype))

        return map_leaves(fresh, self._spec)._replace(offset=mx.array([offset], mx.int64))

    def prefill(self, tokens: Any, state: State, lengths: Any = None) -> tuple[mx.array, State]:
        """Logits (1, v) of the last token of tokens (1, t), right-padded to lengths (1,), and the state.

        Whole chunks from the beginning of one, single tokens elsewhere.
        """
        ids = np.asarray(tokens, np.int32)
        if ids.ndim != 2 or len(ids) != 1 or not ids.size:
            raise ValueError(f"tokens: must have shape (1, t) with t >= 1, got {ids.shape}")
        end = ids.shape[1] if lengths is None else int(np.asarray(lengths).reshape(1)[0])
        chunk, position, at = self.config.chunk_size, int(state.position.item()), 0
        logits = mx.zeros((1, self.config.vocab_size))
        while at < end:
            aligned = (position + at) % chunk == 0
            size = chunk if aligned and at + chunk <= end else 1
            logits, state = self._move(ids[:, at : at + size], state, aligned)
            at += size
        return logits, state

    def decode_one_token(self, token: Any, state: State, active: Any = None) -> tuple[mx.array, State]:
        """Logits (1, v) after one token (1,), and the state; where not `active` the state stays, logits are 0."""
        if active is not None and not np.asarray(active).all():
            return mx.zeros((1, self.config.vocab_size)), state
        aligned = int(state.position.item()) % self.config.chunk_size == 0
        return self._move(np.asarray(token, np.int32).reshape(1, 1), state, aligned)

    def self_test(self) -> float:
        """Run the recorded tokens and return the RMS of the difference over the RMS of the recorded logits."""
        path = self.folder / SELF_TEST
        if not path.is_file():
            raise CheckpointError(f"{path}: file is missing")
        found, state, got, at = load_file(path), self.init_state(), [], 0
        for position in found["positions"].tolist():
            logits, state = self.prefill(found["tokens"][None, at : position + 1], state)
            got.append(np.array(logits[0], np.float64))
            at = position + 1
        wanted = found["logits"].astype(np.float64)
        return float(np.sqrt(np.mean((np.stack(got) - wanted) ** 2) / np.mean(wanted**2)))

    def _move(self, tokens: np.ndarray, state: State, aligned: bool) -> tuple[mx.array, State]:
        """Logits and state after tokens (1, 1) or (1, chunk); aligned: the first begins a chunk."""
        arrays = [x for _, x in leaves(state)]
        if aligned and tokens.shape[1] == 1 and "commit" in self.manifest["functions"]:
            arrays = self._function(*arrays)
        logits, *arrays = self._function(mx.array(tokens), *arrays)
        rest = iter(arrays)
        state = map_leaves(lambda _: next(rest), self._spec)
        mx.eval(logits, state)
        return logits, state


def _check_version(folder: Path, made: str, here: str) -> None:
    """MLX's format has no version of its own: files of other minor versions are misread, so they are not tried."""
    if made.split(".")[:2] != here.split(".")[:2]:
        raise CheckpointError(f"{folder}: was made with MLX {made}, this is {here}; export it again with the one here")
