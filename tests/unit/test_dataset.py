"""Reading a prepared data folder: what is there, and what is wrong where something is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bmojo_edge.dataset import Dataset, DatasetError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three documents of 2, 5 and 1 tokens, written without the writer under test elsewhere."""
    np.array([1, 2, 3, 4, 5, 6, 7, 499], "<u2").tofile(tmp_path / "tokens.bin")
    np.save(tmp_path / "documents.npy", np.array([0, 2, 7, 8], np.int64))
    (tmp_path / "tokenizer.json").write_text("{}")
    info = {"format": "bmojo-dataset", "version": 1, "vocab_size": 500, "dtype": "uint16", "n_tokens": 8}
    info |= {"n_documents": 3, "tokenizer_files": ["tokenizer.json"], "sources": [], "settings": {}}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    return tmp_path


def test_documents_are_slices_of_the_tokens(folder: Path) -> None:
    data = Dataset.open(folder)
    assert (data.n_tokens, data.n_documents, data.vocab_size) == (8, 3, 500)
    assert [data.document(n).tolist() for n in range(3)] == [[1, 2], [3, 4, 5, 6, 7], [499]]
    assert data.offsets.tolist() == [0, 2, 7, 8]
    assert data.tokenizer_files == (folder / "tokenizer.json",)
    assert isinstance(data.tokens, np.memmap) and not data.tokens.flags.writeable
    with pytest.raises(IndexError, match="document 3: there are 3"):
        data.document(3)


def _edit(**fields: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def _offsets(*values: int, dtype: type = np.int64) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / "documents.npy", np.array(values, dtype))


def _resize(name: str, nbytes: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes().ljust(nbytes, b"\0")[:nbytes])


def _unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no info": (_unlink("dataset.json"), r"dataset\.json: file is missing"),
    "broken info": (_resize("dataset.json", 20), r"dataset\.json: not valid JSON"),
    "another format": (_edit(format="webdataset"), r"dataset\.json: format is 'webdataset'"),
    "a later version": (_edit(version=2), r"dataset\.json: version 2 .* reads version 1"),
    "no tokens": (_unlink("tokens.bin"), r"tokens\.bin: file is missing"),
    "tokens cut off": (_resize("tokens.bin", 15), r"tokens\.bin: truncated: 15 bytes, 8 tokens of uint16 need 16"),
    "too many tokens": (_resize("tokens.bin", 18), r"tokens\.bin: too long"),
    "wrong dtype": (_edit(dtype="uint32"), r"dataset\.json: dtype is 'uint32'"),
    "vocabulary that needs four bytes": (_edit(vocab_size=65_537), r"65537 tokens are stored as uint32"),
    "a count that is none": (_edit(n_tokens="8"), r"n_tokens must be a positive integer, got '8'"),
    "no documents": (_unlink("documents.npy"), r"documents\.npy: file is missing"),
    "documents cut off": (_resize("documents.npy", 140), r"documents\.npy: truncated or damaged"),
    "documents emptied": (_resize("documents.npy", 0), r"documents\.npy: truncated or damaged"),
    "one document too few": (_offsets(0, 2, 8), r"documents\.npy: .* 3 documents need int64 \(4,\)"),
    "offsets of another dtype": (_offsets(0, 2, 7, 8, dtype=np.int32), r"documents\.npy: holds int32"),
    "offsets end early": (_offsets(0, 2, 6, 7), r"documents\.npy: offsets run from 0 to 7, must from 0 to 8"),
    "offsets begin late": (_offsets(1, 2, 7, 8), r"documents\.npy: offsets run from 1 to 8"),
    "an empty document": (_offsets(0, 2, 2, 8), r"do not rise: document 1 from 2 to 2"),
    "offsets that fall": (_offsets(0, 7, 2, 8), r"do not rise: document 1 from 7 to 2"),
    "no tokenizer": (_unlink("tokenizer.json"), r"tokenizer\.json: file is missing"),
    "a tokenizer elsewhere": (_edit(tokenizer_files=["../tokenizer.json"]), r"tokenizer_files must be"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(folder: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(DatasetError, match=message):
        Dataset.open(folder)


def test_a_missing_folder_and_one_of_two_parts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere: no such folder; make it with `bmojo-edge data prepare`"):
        Dataset.open(tmp_path / "nowhere")
    parent = tmp_path / "both"
    parent.mkdir()
    for part in ("train", "val"):
        (parent / part).mkdir()
        (parent / part / "dataset.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"name one of its parts: .*both/train or .*both/val"):
        Dataset.open(parent)
