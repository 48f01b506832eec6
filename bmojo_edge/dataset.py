"""A prepared data folder: the tokens of many documents end to end in one memory-mapped file (docs/data.md).

`bmojo-edge data prepare` writes it, the trainer reads it. Knows NumPy and the file system: no text, no tokenizer, no
engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from bmojo_edge.checkpoint import GENERATION, TOKENIZER_FILES
from bmojo_edge.tensors import CheckpointError, read_json

FORMAT, VERSION = "bmojo-dataset", 1
INFO, TOKENS, DOCUMENTS = "dataset.json", "tokens.bin", "documents.npy"
PARTS = ("train", "val")  # folders of a data set that was prepared in two parts


class DatasetError(ValueError):
    """A prepared data folder is missing, damaged or not what it says; the message names the file."""


def token_dtype(vocab_size: int) -> str:
    """How tokens of a vocabulary are stored, little-endian: two bytes where they do, else four."""
    return "uint16" if vocab_size <= 65_536 else "uint32"


@dataclass(frozen=True)
class Dataset:
    """Tokens of documents that follow each other. Make one with `Dataset.open(folder)`.

    Document n is `tokens[offsets[n] : offsets[n + 1]]`; none is empty.
    """

    folder: Path
    tokens: np.ndarray  # (n_tokens,) uint16 or uint32, memory-mapped and read-only
    offsets: np.ndarray  # (n_documents + 1,) int64, rising from 0 to n_tokens
    vocab_size: int
    tokenizer_files: tuple[Path, ...]
    info: dict[str, Any]  # all of dataset.json

    @property
    def n_tokens(self) -> int:
        """How many tokens there are."""
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    def document(self, n: int) -> np.ndarray:
        """The tokens of document n, still memory-mapped."""
        if not 0 <= n < self.n_documents:
            raise IndexError(f"document {n}: there are {self.n_documents}")
        return self.tokens[self.offsets[n] : self.offsets[n + 1]]

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The data set in a folder; its tokens are read when they are looked at.

        Raises DatasetError naming the file that is missing, truncated, of another version or inconsistent.
        """
        folder = Path(folder)
        info = _read_info(folder)
        n_tokens, n_documents, vocab_size = (
            _count(folder, info, name) for name in ("n_tokens", "n_documents", "vocab_size")
        )
        tokens = _map_tokens(folder, info, n_tokens, vocab_size)
        offsets = _read_offsets(folder / DOCUMENTS, n_tokens, n_documents)
        names = info.get("tokenizer_files")
        if not isinstance(names, list) or not all(name in (*TOKENIZER_FILES, GENERATION) for name in names):
            raise DatasetError(
                f"{folder / INFO}: tokenizer_files must be a list of tokenizer file names, got {names!r}"
            )
        files = tuple(folder / name for name in names)
        for file in files:
            if not file.is_file():
                raise DatasetError(f"{file}: file is missing; prepare the data again")
        return cls(folder, tokens, offsets, vocab_size, files, info)


def _read_info(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; make it with `bmojo-edge data prepare`")
    path = folder / INFO
    if not path.is_file():
        parts = [str(folder / part) for part in PARTS if (folder / part / INFO).is_file()]
        hint = f"name one of its parts: {' or '.join(parts)}" if parts else "make it with `bmojo-edge data prepare`"
        raise DatasetError(f"{path}: file is missing, so this is no prepared data folder; {hint}")
    try:
        info = read_json(path)
    except CheckpointError as error:
        raise DatasetError(str(error)) from None
    if info.get("format") != FORMAT:
        raise DatasetError(f"{path}: format is {info.get('format')!r}, not {FORMAT!r}")
    if info.get("version") != VERSION:
        raise DatasetError(
            f"{path}: version {info.get('version')!r} of the format, this program reads version {VERSION}; "
            "prepare the data again"
        )
    return info


def _count(folder: Path, info: dict[str, Any], name: str) -> int:
    value = info.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DatasetError(f"{folder / INFO}: {name} must be a positive integer, got {value!r}")
    return value


def _map_tokens(folder: Path, info: dict[str, Any], n_tokens: int, vocab_size: int) -> np.ndarray:
    path, dtype = folder / TOKENS, info.get("dtype")
    if dtype != token_dtype(vocab_size):
        raise DatasetError(
            f"{folder / INFO}: dtype is {dtype!r}, {vocab_size} tokens are stored as {token_dtype(vocab_size)}"
        )
    kind = np.dtype(str(dtype)).newbyteorder("<")
    if not path.is_file():
        raise DatasetError(f"{path}: file is missing; prepare the data again")
    nbytes = path.stat().st_size
    if nbytes != n_tokens * kind.itemsize:
        what = "truncated" if nbytes < n_tokens * kind.itemsize else "too long"
        raise DatasetError(
            f"{path}: {what}: {nbytes} bytes, {n_tokens} tokens of {dtype} need {n_tokens * kind.itemsize}"
        )
    return np.memmap(path, dtype=kind, mode="r", shape=(n_tokens,))


def _read_offsets(path: Path, n_tokens: int, n_documents: int) -> np.ndarray:
    if not path.is_file():
        raise DatasetError(f"{path}: file is missing; prepare the data again")
    try:
        offsets = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path}: truncated or damaged ({error})") from None
    if offsets.dtype != np.int64 or offsets.shape != (n_documents + 1,):
        raise DatasetError(
            f"{path}: holds {offsets.dtype} of shape {offsets.shape}, {n_documents} documents need int64 "
            f"({n_documents + 1},)"
        )
    if offsets[0] != 0 or offsets[-1] != n_tokens:
        raise DatasetError(f"{path}: offsets run from {offsets[0]} to {offsets[-1]}, must from 0 to {n_tokens}")
    falling = np.flatnonzero(np.diff(offsets) <= 0)
    if len(falling):
        n = int(falling[0])
        raise DatasetError(f"{path}: offsets do not rise: document {n} from {offsets[n]} to {offsets[n + 1]}")
    return offsets
