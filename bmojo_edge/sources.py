"""Documents from files: plain text, JSONL, Parquet, Hugging Face data sets, plain or compressed; read as streams.

Knows files and nothing of tokens. A document comes in pieces of bounded length, so that one as large as the disk can
be read; where it is cut depends on its text alone.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from bmojo_edge.hub import is_hub_id

PIECE = 1 << 18  # characters of a piece, about
BLOCK = 1 << 20  # bytes read at once
TEXT, LINES, PARQUET = (".txt", ".md", ".text"), (".jsonl", ".ndjson"), (".parquet",)
COMPRESSED = (".gz", ".xz", ".zst")
_SAVED = ("dataset_dict.json", "state.json")  # what `datasets.save_to_disk` leaves in a folder


class SourceError(ValueError):
    """A source is missing, damaged or not text; the message names the file and, where there is one, the line."""


class Piece(NamedTuple):
    """Part of a document; the last one of each says that it ends."""

    text: str
    ends: bool


@dataclass
class Reading:
    """How sources are read, and what was left out of them so far.

    text_key: the field or column of the text; split: of a data set; skip_bad: count bad lines instead of failing;
    position(bytes): called with what was read of the present source.
    """

    text_key: str = "text"
    split: str = "train"
    skip_bad: bool = False
    position: Callable[[int], None] = lambda nbytes: None
    bad: int = 0
    first_bad: list[str] = field(default_factory=list)

    def refuse(self, reason: str) -> None:
        """Count a bad line, or raise SourceError where they are not skipped."""
        if not self.skip_bad:
            raise SourceError(f"{reason}; --skip-bad leaves such lines out and counts them")
        self.bad += 1
        if len(self.first_bad) < 5:
            self.first_bad.append(reason)


@dataclass(frozen=True)
class Source:
    """One file, or one data set of the `datasets` library; `path` None is a data set of the hub."""

    name: str
    path: Path | None
    kind: str  # "text", "jsonl", "parquet", "saved" or "hub"
    nbytes: int

    def describe(self) -> dict[str, Any]:
        """What dataset.json keeps of it: name, bytes and sha256 of a file, the name alone of a data set."""
        if self.path is None or self.kind == "saved":
            return {"name": self.name}
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": self.name, "bytes": self.nbytes, "sha256": digest}


# --- finding ----------------------------------------------------------------------------------------------------------


def _kind(path: Path) -> str | None:
    """What the name of a file says it holds; None: nothing that is read here."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        if suffixes and suffixes[-1] in PARQUET:
            return None
    last = suffixes[-1] if suffixes else ""
    return next((k for k, known in (("text", TEXT), ("jsonl", LINES), ("parquet", PARQUET)) if last in known), None)


def find(names: Iterable[str]) -> tuple[list[Source], list[str]]:
    """The sources that files, folders and data sets stand for, folders in order of name; and files passed over.

    Raises SourceError naming what is missing, of an unknown kind, or a folder with nothing to read.
    """
    sources, passed = [], []
    for name in names:
        path = Path(name).expanduser()
        if path.is_file():
            if _kind(path) is None:
                raise SourceError(f"{name}: is of an unknown kind; {_KINDS}")
            sources.append(_file(name, path))
        elif path.is_dir() and any((path / mark).is_file() for mark in _SAVED):
            sources.append(Source(name, path, "saved", 0))
        elif path.is_dir():
            files = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p, path)]
            known = [p for p in files if _kind(p) is not None]
            if not known:
                raise SourceError(f"{name}: nothing in this folder can be read; {_KINDS}")
            sources += [_file(f"{name.rstrip('/')}/{p.relative_to(path).as_posix()}", p) for p in known]
            passed += [str(p) for p in files if _kind(p) is None]
        elif not path.exists() and is_hub_id(name) and not path.suffix:
            sources.append(Source(name, None, "hub", 0))
        else:
            raise SourceError(f"{name}: no such file or folder, and no data set of the form owner/name")
    return sources, passed


_KINDS = f"known are {', '.join((*TEXT, *LINES))} (also with {', '.join(COMPRESSED)}) and {', '.join(PARQUET)}"


def _file(name: str, path: Path) -> Source:
    kind = _kind(path)
    assert kind is not None
    return Source(name, path, kind, path.stat().st_size)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


# --- reading ----------------------------------------------------------------------------------------------------------


def pieces(source: Source, reading: Reading) -> Iterator[Piece]:
    """The documents of a source, one after the other, in pieces. Raises SourceError naming file and line."""
    if source.kind == "text":
        yield from cut(_text(source, reading))
        return
    read = {"jsonl": _jsonl, "parquet": _parquet}.get(source.kind, _dataset)
    for document in read(source, reading):
        yield from cut([document])


def cut(parts: Iterable[str]) -> Iterator[Piece]:
    """One document, given in parts of any lengths, as pieces of at most PIECE characters.

    A piece ends after a newline between two characters that are no white space, where there is one: no tokenizer in
    use merges across it. Else it ends before a space, else where it must.
    """
    held = ""
    for part in parts:
        for at in range(0, len(part), PIECE):  # what is held stays short, so that cutting it is cheap
            held += part[at : at + PIECE]
            while len(held) > PIECE:
                end = _border(held)
                yield Piece(held[:end], False)
                held = held[end:]
    yield Piece(held, True)


def _border(text: str) -> int:
    at = PIECE
    while (at := text.rfind("\n", 1, at)) > PIECE // 2:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
    at = text.rfind(" ", PIECE // 2, PIECE)
    return at if at > 0 else PIECE


def _blocks(source: Source, reading: Reading) -> Iterator[bytes]:
    """The content of a file, decompressed, in blocks. Raises SourceError where it is cut off or damaged."""
    assert source.path is not None
    with source.path.open("rb") as raw:
        content = _CONTENTS.get(source.path.suffix.lower(), _plain)(raw)
        try:
            for block in content:
                yield block
                reading.position(raw.tell())
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, _Damaged) as error:
            raise SourceError(f"{source.name}: truncated or damaged ({error})") from None


def _plain(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.read(BLOCK), b"")


class _Damaged(Exception):
    """A .zst file is not what it should be."""


def _zstandard(raw: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: the library's own reader does not notice where a file was cut off."""
    import zstandard

    frame = None
    try:
        for held in iter(lambda: raw.read(1 << 16), b""):
            while held:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(held)
                held, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise _Damaged(error) from None
    if frame is not None:
        raise _Damaged("the last frame does not end")


_CONTENTS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    ".gz": lambda raw: _plain(cast(BinaryIO, gzip.GzipFile(fileobj=raw))),
    ".xz": lambda raw: _plain(cast(BinaryIO, lzma.LZMAFile(raw))),  # noqa: SIM115  (closed with the file below it)
    ".zst": _zstandard,
}


def _text(source: Source, reading: Reading) -> Iterator[str]:
    """A text file in blocks; a byte-order mark is dropped, line ends stay as they are."""
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    for block in _and_end(_blocks(source, reading)):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise SourceError(f"{source.name}:{line}: is not UTF-8 text ({error.reason})") from None
        line += text.count("\n")
        yield text


def _and_end(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Blocks that are not empty, then an empty one."""
    yield from filter(None, blocks)
    yield b""


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends; the last one may lack its own."""
    held: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        held.append(first)
        if others:
            yield b"".join(held)
            yield from others[:-1]
            held = [others[-1]]
    yield b"".join(held)


def _jsonl(source: Source, reading: Reading) -> Iterator[str]:
    for n, line in enumerate(_lines(_blocks(source, reading)), start=1):
        if not line.strip():
            continue
        where = f"{source.name}:{n}"
        try:
            record = json.loads(line)
        except ValueError as error:  # also bytes that are no UTF-8
            reading.refuse(f"{where}: is not valid JSON ({error})")
            continue
        yield from _field(record, where, reading)


def _field(record: Any, where: str, reading: Reading) -> Iterator[str]:
    """The text of a record, if it has one."""
    key = reading.text_key
    if not isinstance(record, dict):
        reading.refuse(f"{where}: holds {type(record).__name__}, not an object")
    elif key not in record:
        reading.refuse(f"{where}: has no field {key!r}, only {', '.join(map(repr, record)) or 'none'} (see --text-key)")
    elif not isinstance(record[key], str):
        reading.refuse(f"{where}: field {key!r} is {type(record[key]).__name__}, not a string")
    else:
        try:
            record[key].encode()
        except UnicodeEncodeError as error:
            reading.refuse(f"{where}: field {key!r} is not valid Unicode at character {error.start} (a lone surrogate)")
        else:
            yield record[key]


def _parquet(source: Source, reading: Reading) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    key, done = reading.text_key, 0
    try:
        file = parquet.ParquetFile(source.path)
        if key not in file.schema_arrow.names:
            names = ", ".join(map(repr, file.schema_arrow.names))
            raise SourceError(f"{source.name}: has no column {key!r}, only {names} (see --text-key)")
        rows = max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=256, columns=[key]):
            for n, value in enumerate(batch.column(0).to_pylist(), start=done + 1):
                yield from _field({key: value}, f"{source.name}: row {n}", reading)
            done += batch.num_rows
            reading.position(source.nbytes * done // rows)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise SourceError(f"{source.name}: truncated or damaged ({error})") from None


def _dataset(source: Source, reading: Reading) -> Iterator[str]:
    """A data set of the hub, streamed, or one that `save_to_disk` left in a folder."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if source.kind == "hub":
            rows: Any = datasets.load_dataset(source.name, split=reading.split, streaming=True)
        else:
            rows = datasets.load_from_disk(str(source.path))
            if isinstance(rows, datasets.DatasetDict):
                if reading.split not in rows:
                    raise SourceError(
                        f"{source.name}: has no split {reading.split!r}, only {', '.join(map(str, rows))}"
                    )
                rows = rows[reading.split]
    except SourceError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{source.name}: cannot be opened as a data set ({reason})") from error
    for n, record in enumerate(rows, start=1):
        yield from _field(record, f"{source.name}: row {n}", reading)
