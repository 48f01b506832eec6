"""Tensors in safetensors files: lazy reading of a folder's shards, streaming writing of new ones.

Knows the files and nothing of models: which names and shapes there should be is the caller's business. Reading and
writing hold one tensor in memory at a time; pickled files are never opened.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes  # also registers bfloat16 with NumPy, which safetensors needs to read it
import numpy as np
from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # the shard size Hugging Face uses
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

bfloat16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
FLOATS = ("float64", "float32", "float16", "bfloat16")
_CODES = {name: code for code, name in _DTYPES.items()}


class CheckpointError(Exception):
    """A checkpoint is missing, damaged or not what it says; the message names the file and the tensor or field."""


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor; `dtype` is NumPy's name of it."""

    dtype: str
    shape: tuple[int, ...]
    path: Path


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of safetensors files by name; each access reads one tensor, headers are read at once.

    Raises CheckpointError for a file that is missing, truncated or damaged, and for a name found twice.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._info: dict[str, TensorInfo] = {}
        for path in paths:
            for name, info in _header(path).items():
                if name in self._info:
                    raise CheckpointError(f"{path}: tensor {name!r} is also in {self._info[name].path.name}")
                self._info[name] = info

    @classmethod
    def open(cls, folder: Path) -> Tensors:
        """The weights of a folder in the Hugging Face layout: model.safetensors, or its index and shards."""
        if (folder / WEIGHTS).is_file():
            return cls([folder / WEIGHTS])
        if not (folder / INDEX).is_file():
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
            if pickles:
                raise CheckpointError(
                    f"{folder}: holds only pickled weights ({pickles[0]}), which can run code when opened and are "
                    f"refused; ask the publisher for {WEIGHTS} or save them again with safetensors"
                )
            raise CheckpointError(f"{folder}: has neither {WEIGHTS} nor {INDEX}")
        placed = _read_index(folder / INDEX)
        tensors = cls([folder / file for file in sorted(set(placed.values()))])
        for name, file in placed.items():
            if name not in tensors or tensors.info(name).path.name != file:
                raise CheckpointError(f"{folder / file}: tensor {name!r} is missing, {INDEX} places it here")
        return tensors

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and file of a tensor, without reading it."""
        return self._info[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._info[name].shape

    def __getitem__(self, name: str) -> np.ndarray:
        path = self._info[name].path
        try:  # opened for each read: a mapping held open would keep every page it ever touched in memory
            with safe_open(path, framework="numpy") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: tensor {name!r} cannot be read ({error})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._info)

    def __len__(self) -> int:
        return len(self._info)


def _header(path: Path) -> dict[str, TensorInfo]:
    if not path.is_file():
        raise CheckpointError(f"{path}: file is missing")
    found = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  (a handle is no mapping)
                view = file.get_slice(name)
                code = view.get_dtype()
                if code not in _DTYPES:
                    raise CheckpointError(f"{path}: tensor {name!r} has dtype {code}, which is not supported")
                found[name] = TensorInfo(_DTYPES[code], tuple(view.get_shape()), path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error})") from None
    return found


def _read_index(path: Path) -> dict[str, str]:
    content = read_json(path)
    placed = content.get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise CheckpointError(f"{path}: weight_map is missing or is no table of file names")
    for file in placed.values():
        if Path(file).name != file:
            raise CheckpointError(f"{path}: weight_map names {file!r}, which is outside the folder")
    return placed


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError naming the file when it is missing or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold an object, holds {type(content).__name__}")
    return content


class Spec(NamedTuple):
    """Dtype (NumPy's name) and shape of a tensor to be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def _plan(specs: Mapping[str, Spec], shard_bytes: int) -> list[list[str]]:
    """Names of each shard, in the order given; a tensor larger than a shard gets one of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, spec in specs.items():
        if shards[-1] and used + spec.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += spec.nbytes
    return shards


def _head(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, and where in it each tensor begins, in order."""
    # Wide dtypes first keeps every tensor aligned to its own size.
    names = sorted(specs, key=lambda x: (-np.dtype(specs[x].dtype).itemsize, x))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        begin, end = end, end + specs[name].nbytes
        entry = {"dtype": _CODES[specs[name].dtype], "shape": specs[name].shape, "data_offsets": (begin, end)}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    places = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in names}
    return struct.pack("<Q", len(text)) + text, places


def write_tensors(file: BinaryIO, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata as one safetensors file, without holding a copy of them."""
    head, places = _head({name: Spec(array.dtype.name, array.shape) for name, array in tensors.items()}, metadata)
    file.write(head)
    for name in places:
        file.write(raw_bytes(tensors[name]))


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class TensorWriter:
    """Writes tensors of known dtype and shape, in any order, as model.safetensors or as shards with their index.

    The header is written first, so each tensor goes straight to its place and none is kept. `close` checks that all
    came and flushes them to the disk.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Spec], shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._specs, self._missing = folder, dict(specs), set(specs)
        self._place: dict[str, tuple[BinaryIO, int]] = {}
        self._file_of: dict[str, str] = {}
        self._files: list[BinaryIO] = []
        shards = _plan(specs, shard_bytes)
        for n, names in enumerate(shards, start=1):
            file = WEIGHTS if len(shards) == 1 else f"model-{n:05d}-of-{len(shards):05d}.safetensors"
            self._start(file, names)

    def _start(self, name: str, names: list[str]) -> None:
        head, places = _head({tensor: self._specs[tensor] for tensor in names}, {"format": "pt"})
        file = (self._folder / name).open("xb")
        file.write(head)
        for tensor, place in places.items():
            self._place[tensor] = (file, place)
            self._file_of[tensor] = name
        self._files.append(file)

    def write(self, name: str, array: np.ndarray) -> None:
        """Write one tensor to its place; its dtype and shape must be the announced ones."""
        spec = self._specs[name]
        if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise ValueError(f"{name}: announced as {spec.dtype} {spec.shape}, got {array.dtype} {array.shape}")
        file, offset = self._place[name]
        file.seek(offset)
        file.write(raw_bytes(array))
        self._missing.discard(name)

    def close(self) -> None:
        """Flush all files to the disk and write the index where there are several."""
        if self._missing:
            raise ValueError(f"never written: {', '.join(sorted(self._missing)[:3])}")
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if len(self._files) > 1:
            total = sum(spec.nbytes for spec in self._specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._file_of.items()))}
            write_text(self._folder / INDEX, json.dumps(index, indent=2) + "\n")

    def abandon(self) -> None:
        """Close the files of a writing that failed; they are the caller's to remove."""
        for file in self._files:
            file.close()


def write_text(path: Path, text: str) -> None:
    """Write a text file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def as_numpy(array: Any) -> np.ndarray:
    """A NumPy array from NumPy's, PyTorch's or MLX's, bfloat16 included; neither framework is imported."""
    if isinstance(array, np.ndarray):
        return array
    halves = str(array.dtype).endswith("bfloat16")  # NumPy has no such type of its own: pass the bits
    if hasattr(array, "detach"):  # PyTorch
        array = array.detach().cpu()
        plain = (array.view(sys.modules["torch"].uint16) if halves else array).numpy()
    else:
        plain = np.array(array.view(sys.modules["mlx.core"].uint16) if halves else array)
    return plain.view(bfloat16) if halves else plain
