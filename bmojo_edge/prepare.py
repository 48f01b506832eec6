"""From text to a prepared data folder (docs/data.md): documents read, cut into tokens by processes, written in order.

What is written depends on the sources and the settings alone, not on how many processes work. The folder appears whole
or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmojo_edge import vocabulary
from bmojo_edge.checkpoint import GENERATION, TOKENIZER_FILES, copy_tokenizer
from bmojo_edge.dataset import DOCUMENTS, FORMAT, INFO, PARTS, TOKENS, VERSION, DatasetError, token_dtype
from bmojo_edge.encode import Encoded, Part, in_order
from bmojo_edge.sources import PIECE, Piece, Reading, Source, find, pieces
from bmojo_edge.staging import staged
from bmojo_edge.tensors import CheckpointError, read_json, write_text
from bmojo_edge.tokenizer import FILES, Tokenizer

Progress = Callable[[str, int, int], None]

_TOKENIZER = (*TOKENIZER_FILES, GENERATION)


@dataclass(frozen=True)
class Settings:
    """What decides the content of a prepared folder besides the sources; dataset.json keeps it.

    train_vocab: pieces of a vocabulary to learn, None with a given tokenizer; eos: end every document with the
    tokenizer's end-of-sequence token, None: where it has one; val: share of the documents in the part `val`; split: of
    a Hugging Face data set.
    """

    text_key: str = "text"
    train_vocab: int | None = None
    eos: bool | None = None
    val: float = 0.0
    split: str = "train"
    skip_bad: bool = False


@dataclass(frozen=True)
class Prepared:
    """What was made: tokens and documents of each part, and what was left out."""

    folders: dict[str, Path]  # part -> folder; the only part of an undivided set is ""
    n_tokens: dict[str, int]
    n_documents: dict[str, int]
    vocab_size: int
    empty_documents: int
    bad_lines: int
    first_bad: list[str]
    passed_over: list[str]
    seconds: float  # of cutting into tokens


def prepare(
    names: Iterable[str],
    out: Path,
    settings: Settings,
    tokenizer: Path | None = None,
    jobs: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Make a prepared data folder `out` of files, folders and data sets; with `settings.val` its parts train and val.

    tokenizer: a tokenizer.json, a tokenizer.model, or a folder with one of them; None: learn `settings.train_vocab`
    pieces. Raises SourceError, DatasetError, VocabularyError or CheckpointError, each naming the file or setting.
    """
    if (tokenizer is None) == (settings.train_vocab is None):
        raise DatasetError("--tokenizer or --train-vocab: give one of the two")
    if not 0 <= settings.val < 1:
        raise DatasetError(f"--val: must be at least 0 and below 1, got {settings.val}")
    if jobs < 1:
        raise DatasetError(f"--jobs: must be at least 1, got {jobs}")
    sources, passed = find(names)
    report = progress or (lambda stage, done, total: None)
    with staged(out, lambda folder: _check_replaceable(folder, overwrite)) as temporary:
        folders = {part: temporary / part for part in (PARTS if settings.val else ("",))}
        for folder in folders.values():
            folder.mkdir(exist_ok=True)
        first, *others = folders.values()
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, first)
        elif settings.train_vocab is not None:
            texts = (piece.text for piece in _read(sources, _reading(settings), "vocabulary", report))
            vocabulary.train(texts, settings.train_vocab, first)
        for folder in others:
            copy_tokenizer(first, folder)
        vocab_size = Tokenizer.load(first).vocab_size
        dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        parts, reading, began = _Parts(folders, dtype, settings.val), _reading(settings), time.perf_counter()
        try:
            _encode(_read(sources, reading, "tokens", report), first, settings.eos, jobs, parts)
            parts.close()
        finally:
            parts.abandon()
        seconds = time.perf_counter() - began
        _describe(parts, vocab_size, [source.describe() for source in sources], settings)
    return Prepared(
        {part: out / part for part in folders},
        {part: writer.n_tokens for part, writer in parts.writers.items()},
        {part: writer.n_documents for part, writer in parts.writers.items()},
        vocab_size,
        parts.empty,
        reading.bad,
        reading.first_bad,
        passed,
        seconds,
    )


def _describe(parts: _Parts, vocab_size: int, sources: list[dict[str, Any]], settings: Settings) -> None:
    """Write the dataset.json of each part."""
    for part, writer in parts.writers.items():
        info = {
            "format": FORMAT,
            "version": VERSION,
            "vocab_size": vocab_size,
            "dtype": token_dtype(vocab_size),
            "n_tokens": writer.n_tokens,
            "n_documents": writer.n_documents,
            "tokenizer_files": sorted(p.name for p in writer.folder.iterdir() if p.name in _TOKENIZER),
            "sources": sources,
            "settings": {"part": part or None, **asdict(settings)},
        }
        write_text(writer.folder / INFO, json.dumps(info, indent=2, ensure_ascii=False) + "\n")


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    """Raise DatasetError unless an existing path is an empty folder, or prepared data and `overwrite`."""
    entries = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None
    if entries == []:
        return
    if not overwrite:
        raise DatasetError(f"{folder}: exists; choose another name, or --overwrite replaces it")
    known = {INFO, TOKENS, DOCUMENTS, *_TOKENIZER}
    parts = [folder / part for part in PARTS if (folder / part).is_dir()]
    for place in parts or [folder]:
        if not (place / INFO).is_file() or read_json(place / INFO).get("format") != FORMAT:
            raise DatasetError(f"{folder}: exists and is not a prepared data folder, so it is not replaced")
        for path in place.iterdir():
            if path.name not in known:
                raise DatasetError(f"{path}: is no part of prepared data and would be lost; move it elsewhere")
    for name in entries or ():
        if parts and name not in PARTS:
            raise DatasetError(f"{folder / name}: is no part of prepared data and would be lost; move it elsewhere")


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer files of a folder; of one file named as usual also what stands beside it and says how to use it."""
    if not source.exists():
        raise CheckpointError(f"{source}: no such tokenizer file or folder")
    if source.is_dir():
        Tokenizer.load(source)
        copy_tokenizer(source, folder)
        return
    name = {".json": "tokenizer.json", ".model": "tokenizer.model"}.get(source.suffix)
    if name is None:
        raise CheckpointError(f"{source}: must be a tokenizer.json, a tokenizer.model or a folder with one of them")
    if source.name in FILES:
        copy_tokenizer(source.parent, folder)
        for other in FILES:
            (folder / other).unlink(missing_ok=True)
    shutil.copyfile(source, folder / name)
    Tokenizer.load(folder)


# --- reading and writing ----------------------------------------------------------------------------------------------


def _reading(settings: Settings) -> Reading:
    return Reading(settings.text_key, settings.split, settings.skip_bad)


def _read(sources: list[Source], reading: Reading, stage: str, report: Progress) -> Iterator[Piece]:
    """The pieces of all sources, reporting the bytes read."""
    total, before = sum(source.nbytes for source in sources), 0
    for source in sources:
        reading.position = lambda nbytes, before=before: report(stage, before + nbytes, total)
        yield from pieces(source, reading)
        before += source.nbytes
        report(stage, before, total)


def _encode(read: Iterator[Piece], tokenizer: Path, eos: bool | None, jobs: int, parts: _Parts) -> None:
    """Cut all documents into tokens and write them; those of white space alone are counted only."""
    waiting: deque[list[Part]] = deque()

    def groups() -> Iterator[list[Part]]:
        group: list[Part] = []
        held, begins = 0, True
        for piece in read:
            if begins and piece.ends and not piece.text.strip():
                parts.empty += 1
                continue
            group.append(Part(piece.text, begins, piece.ends))
            held, begins = held + len(piece.text), piece.ends
            if held >= PIECE:
                waiting.append(group)
                yield group
                group, held = [], 0
        if group:
            waiting.append(group)
            yield group

    for encoded in in_order(groups(), tokenizer, eos, jobs):
        parts.write(encoded, waiting.popleft())


class _Writer:
    """tokens.bin and documents.npy of one part."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.folder, self.dtype, self.ends = folder, dtype, array("q", [0])
        self.file = (folder / TOKENS).open("w+b")

    @property
    def n_tokens(self) -> int:
        return self.ends[-1]

    @property
    def n_documents(self) -> int:
        return len(self.ends) - 1

    def end_document(self) -> bool:
        """End the present document; False where it has no tokens."""
        end = self.file.tell() // self.dtype.itemsize
        if end == self.n_tokens:
            return False
        self.ends.append(end)
        return True

    def move_tail(self, n: int, other: _Writer) -> None:
        """Move the last n tokens of a single document to another part, as its document."""
        end = self.n_tokens - n
        self.file.seek(end * self.dtype.itemsize)
        shutil.copyfileobj(self.file, other.file)
        other.end_document()
        self.file.truncate(end * self.dtype.itemsize)
        self.file.seek(0, os.SEEK_END)
        self.ends[-1] = end

    def close(self) -> None:
        """Write the offsets and flush both files to the disk."""
        with (self.folder / DOCUMENTS).open("xb") as documents:
            np.save(documents, np.frombuffer(self.ends, np.int64))
            for file in (self.file, documents):
                file.flush()
                os.fsync(file.fileno())
        self.file.close()


class _Parts:
    """Documents go to one part, or by turns to two: of every 1 / val documents one is for `val`."""

    def __init__(self, folders: dict[str, Path], dtype: np.dtype, val: float) -> None:
        self.writers = {part: _Writer(folder, dtype) for part, folder in folders.items()}
        self.val, self.documents, self.empty = val, 0, 0
        self._writer = self._next()

    def _next(self) -> _Writer:
        turn = int((self.documents + 1) * self.val + 0.5) - int(self.documents * self.val + 0.5)
        return self.writers[PARTS[turn] if self.val else ""]

    def write(self, encoded: Encoded, group: list[Part]) -> None:
        """The tokens of a group of pieces, each to the part of its document."""
        data, at = memoryview(encoded.data), 0
        for count, part in zip(encoded.counts, group, strict=True):
            end = at + count * self._writer.dtype.itemsize
            self._writer.file.write(data[at:end])
            at = end
            if part.ends:
                if self._writer.end_document():
                    self.documents += 1
                else:
                    self.empty += 1
                self._writer = self._next()

    def close(self) -> None:
        """Finish both; one document alone is cut, its end is `val`. Raises DatasetError where a part is empty."""
        if not self.documents:
            raise DatasetError(f"the sources hold no text ({self.empty} empty documents)")
        if self.val and self.documents == 1:
            train, val = (self.writers[part] for part in PARTS)
            if val.n_documents:
                val.move_tail(val.n_tokens, train)
                val.ends = array("q", [0])
            train.move_tail(round(train.n_tokens * self.val), val)
        for part, writer in self.writers.items():
            if not writer.n_tokens or not writer.n_documents:
                raise DatasetError(
                    f"--val: {self.val} of {self.documents} documents leaves the part {part!r} empty; choose another"
                )
            writer.close()

    def abandon(self) -> None:
        """Close the files of a preparation that failed; they are the caller's to remove."""
        for writer in self.writers.values():
            writer.file.close()
