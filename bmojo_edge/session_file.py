"""A session on the disk: one safetensors file of bounded size, whole or not there, refused where it does not fit.

Tensors are the moments of the conversation; the header holds everything else as JSON, a CRC-32 of each tensor and a
hash of the header itself (docs/sessions.md). This module knows moments and models; what the JSON means is its caller's.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from bmojo_edge.config import Config
from bmojo_edge.engine import LM, as_engine, weights_fingerprint
from bmojo_edge.moment import Moment
from bmojo_edge.staging import staged_file
from bmojo_edge.state import GROWTH, leaves, map_leaves
from bmojo_edge.tensors import as_numpy, raw_bytes, write_tensors
from bmojo_edge.tokenizer import Tokenizer

FORMAT, VERSION = "bmojo-edge session", 1
_ROUND = 2**16  # headers are padded to whole multiples of this, so that a file's size does not follow every digit


class SessionError(ValueError):
    """A session cannot do what it was asked to, or a file is no session of this model; the message says why."""


# --- which model it is


def identity(lm: LM) -> dict[str, Any]:
    """What tells one model from another: its config, some of its weights, its tokenizer, and where it came from."""
    assert lm.tokenizer is not None
    return {
        "config": lm.config.to_dict(),
        "weights": weights_fingerprint(lm),
        "tokenizer": _tokenizer_fingerprint(lm.tokenizer),
        "folder": None if lm.tokenizer.folder is None else str(lm.tokenizer.folder.absolute()),
    }


def _tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    some = range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // 256))
    known = (tokenizer.vocab_size, sorted(tokenizer.eos_ids), tokenizer.decode(some))
    return hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()


def _check_model(path: Path, saved: Mapping[str, Any], lm: LM) -> None:
    ours = identity(lm)
    hint = f"open it with the model it was made with{', ' + saved['folder'] if saved['folder'] else ''}"
    for field in sorted({*saved["config"], *ours["config"]}):
        there, here = saved["config"].get(field), ours["config"].get(field)
        if there != here:
            raise SessionError(f"{path}: config.{field} is {there!r} in the session and {here!r} in this model; {hint}")
    for part in ("tokenizer", "weights"):
        if saved[part] != ours[part]:
            raise SessionError(f"{path}: was made with a model of other {part.rstrip('s')}s; {hint}")


def _storage(lm: LM) -> dict[str, str] | None:
    """The store beside a model, None where there is none."""
    store = getattr(lm, "store", None)
    return None if store is None else {"id": store.id, "folder": str(store.folder.absolute())}


# --- writing


class SavedSession(NamedTuple):
    """A session as it will be in a file; it holds nothing of the engine."""

    body: str  # JSON
    tensors: dict[str, np.ndarray]


def packed(lm: LM, content: Mapping[str, Any], moments: Sequence[Moment]) -> SavedSession:
    """What is to be written: `content` is JSON of the caller's, `moments` are numbered in order."""
    tensors, table = {}, []
    for i, moment in enumerate(moments):
        tensors |= {f"{i}.{name}": array for name, array in _arrays(moment, lm.config).items()}
        table.append({"pending": moment.pending, "hash": f"{moment.rolling_hash:016x}", "draws": _hex(moment.draws)})
    head = {"model": identity(lm), "storage": _storage(lm), "moments": table, **content}
    return SavedSession(json.dumps(head, ensure_ascii=False), tensors)


def write(path: Path, session: SavedSession) -> None:
    """Write a session; the file takes its name when all of it is on the disk, until then the former one stays."""
    body, tensors = session
    sums = json.dumps({name: f"{zlib.crc32(raw_bytes(array)):08x}" for name, array in tensors.items()})
    shapes = {name: (array.dtype.name, array.shape) for name, array in tensors.items()}
    head = {"format": FORMAT, "version": str(VERSION), "session": body, "crc32": sums}
    head["checksum"] = _checksum(head, shapes)
    head["padding"] = " " * (-len(body.encode()) % _ROUND)
    check_replaceable(path)
    with staged_file(path) as file:
        write_tensors(file, tensors, head)


def check_replaceable(path: Path) -> None:
    """Raise SessionError where `path` is anything but a session, an empty file or nothing, or may not be written."""
    if not path.parent.is_dir():
        raise SessionError(f"{path}: there is no folder {path.parent}; make it first")
    if not path.exists():
        return
    if path.is_file() and not path.stat().st_mode & 0o222:  # renaming would write over it all the same
        raise SessionError(f"{path}: is read-only; make it writable, or choose another name")
    if path.is_file() and not path.stat().st_size:
        return
    try:
        with safe_open(path, framework="numpy") as file:
            ours = (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        ours = False
    if not ours:
        raise SessionError(f"{path}: exists and is no session file, so it is not replaced; choose another name")


def _arrays(moment: Moment, config: Config) -> dict[str, np.ndarray]:
    """A moment's tensors: the state's leaves, the recent ids, and the kept ones as rows of positions and ids."""
    found = {f"state.{name}": np.ascontiguousarray(as_numpy(leaf)) for name, leaf in leaves(moment.state)}
    found["recent"] = np.full(config.window, -1, np.int64)
    found["recent"][: len(moment.read)] = moment.read
    slots = config.layer_types.count("bmojo") * config.n_eidetic + config.n_sinks
    found["kept"] = np.full((2, slots), -1, np.int64)
    found["kept"][:, : len(moment.kept)] = [list(moment.kept.keys()), list(moment.kept.values())]
    return found


def _hex(draws: Mapping[str, Any]) -> dict[str, str]:
    """The state of PCG64, as many digits whatever its value."""
    numbers = {**draws["state"], "has_uint32": draws["has_uint32"], "uinteger": draws["uinteger"]}
    return {name: f"{value:032x}" for name, value in numbers.items()}


def _checksum(head: Mapping[str, str], shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    parts = [head[name] for name in ("format", "version", "session", "crc32")]
    text = json.dumps([parts, sorted((name, dtype, list(shape)) for name, (dtype, shape) in shapes.items())])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# --- reading


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a file holds: the JSON and the tensors, all checked. Raises SessionError naming what is wrong with it."""
    if path.is_dir():
        raise SessionError(f"{path}: is a folder and no session file")
    try:
        with safe_open(path, framework="numpy") as file:
            head = file.metadata() or {}
            if head.get("format") != FORMAT:
                raise SessionError(f"{path}: is not a session file")
            if head.get("version") != str(VERSION):
                raise SessionError(f"{path}: version: is {head.get('version')}, this program reads {VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a handle is no mapping)
    except SafetensorError as error:
        raise SessionError(f"{path}: is no session file, or truncated or damaged ({error})") from None
    shapes = {name: (array.dtype.name, array.shape) for name, array in tensors.items()}
    missing = {"session", "crc32", "checksum", "padding"} - head.keys()
    if missing or head["padding"].strip(" ") or head["checksum"] != _checksum(head, shapes):
        raise SessionError(f"{path}: damaged: the header is not what was written")
    for name, crc in json.loads(head["crc32"]).items():
        if f"{zlib.crc32(raw_bytes(tensors[name])):08x}" != crc:
            raise SessionError(f"{path}: damaged: tensor {name!r} is not what was written")
    return json.loads(head["session"]), tensors


class Origin(NamedTuple):
    """Where the model of a session was when it was saved, and the store beside it, if any."""

    model: str | None
    store: str | None
    store_id: str | None


def origin(path: Path) -> Origin:
    """What a session was made with. Raises SessionError as `read` does."""
    content, _ = read(path)
    storage = content.get("storage") or {}
    return Origin(content["model"]["folder"], storage.get("folder"), storage.get("id"))


def opened(path: Path, lm: LM) -> tuple[dict[str, Any], list[Moment]]:
    """A session's JSON and its moments in arrays of the model's engine.

    Beside another store than its own, or the first one, nothing is recalled yet. Raises SessionError naming the field
    or tensor that is damaged, or in which the model is another; or the store, where it has one and the model none.
    """
    content, tensors = read(path)
    _check_model(path, content["model"], lm)
    former, here = content.get("storage"), _storage(lm)
    if former and not here:
        raise SessionError(
            f"{path}: has storage in {former['folder']}; open it with that store beside the model (--memory STORE)"
        )
    storing: Any = lm if here and (former is None or former["id"] != here["id"]) else None
    fresh = lm.init_state() if storing is None else storing.lm.init_state()
    moments = [_moment(path, lm, fresh, i, entry, tensors) for i, entry in enumerate(content["moments"])]
    if storing is not None:
        moments = [m._replace(state=storing.around(m.state, m.read)) for m in moments]
    return content, moments


def _moment(
    path: Path, lm: LM, fresh: Any, i: int, entry: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Moment:
    """Moment i of a file, its arrays like those of a `fresh` state."""
    growing = {f"layers.{layer}" for layer in lm.config.growing_layers}
    found = {}
    for name, leaf in leaves(fresh):
        array, dtype, shape = tensors[f"{i}.state.{name}"], str(leaf.dtype).rpartition(".")[2], tuple(leaf.shape)
        if name.rpartition(".")[0] in growing and array.shape[2] % GROWTH == 0:
            shape = (*shape[:2], array.shape[2], *shape[3:])
        if (array.dtype.name, array.shape) != (dtype, shape):
            raise SessionError(
                f"{path}: tensor '{i}.state.{name}' is {array.dtype} {array.shape}, this model has {dtype} {shape}"
            )
        found[name] = as_engine(array, leaf)
    restored = iter(found.values())
    state = map_leaves(lambda _: next(restored), fresh)
    numbers = {name: int(value, 16) for name, value in entry["draws"].items()}
    draws = {
        "bit_generator": "PCG64",
        "state": {name: numbers[name] for name in ("state", "inc")},
        "has_uint32": numbers["has_uint32"],
        "uinteger": numbers["uinteger"],
    }
    recent, (positions, ids) = tensors[f"{i}.recent"], tensors[f"{i}.kept"].tolist()
    kept = {position: token for position, token in zip(positions, ids, strict=True) if position >= 0}
    pending = tuple(entry["pending"])
    return Moment(state, pending, (*recent[recent >= 0].tolist(), *pending), int(entry["hash"], 16), kept, draws)
