"""`bmojo-edge memory` and `chat --memory`: files go in, are found, listed, removed, checked; a chat recalls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import bmojo_edge as be
from bmojo_edge import checkpoint
from bmojo_edge.cli import app
from bmojo_edge.config import Config
from bmojo_edge.documents import DocumentError, read_document
from bmojo_edge.recall import WithStorage, shape_for
from bmojo_edge.session_file import identity
from bmojo_edge.storage import Store
from bmojo_edge.tokenizer import Tokenizer
from tests.helpers import random_weights


def write_pdf(path: Path, text: str) -> None:
    """One page with one line."""
    pypdf = pytest.importorskip("pypdf", reason="PDF is read by pypdf")
    generic = pypdf.generic
    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(200, 200)
    font = generic.DictionaryObject(
        {generic.NameObject("/Type"): generic.NameObject("/Font"),
         generic.NameObject("/Subtype"): generic.NameObject("/Type1"),
         generic.NameObject("/BaseFont"): generic.NameObject("/Helvetica")}
    )  # fmt: skip
    fonts = generic.DictionaryObject({generic.NameObject("/F"): font})
    page[generic.NameObject("/Resources")] = generic.DictionaryObject({generic.NameObject("/Font"): fonts})
    content = generic.DecodedStreamObject()
    content.set_data(f"BT /F 12 Tf 20 100 Td ({text}) Tj ET".encode())
    page[generic.NameObject("/Contents")] = content
    writer.write(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, byte_level_folder: Path) -> Path:
    config = Config.preset(
        "tiny", vocab_size=Tokenizer.load(byte_level_folder).vocab_size, window=64, chunk=16, n_sinks=2, ssm=None,
        n_fading=0, n_eidetic=0,
    )  # fmt: skip
    folder, weights = tmp_path_factory.mktemp("models") / "windowed", random_weights(config)
    weights["embed.weight"] *= 0.02  # else a tied model says its last token again, whatever it recalls
    checkpoint.save(folder, config, weights, tokenizer=byte_level_folder)
    return folder


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("The heron stands in the reeds. " * 12, encoding="utf-8")
    (folder / "b.md").write_text("# Boats\n\nA boat needs *paint*. " * 9, encoding="utf-8")
    write_pdf(folder / "c.pdf", "Heron island")
    return folder


def run(*arguments: Any, code: int = 0) -> Result:
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    found = CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)
    assert found.exit_code == code, (found.output, found.exception)
    return found


def test_a_store_from_first_file_to_last(model: Path, notes: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    files = [notes / name for name in ("a.txt", "b.md", "c.pdf")]
    added = json.loads(run("memory", "add", store, *files, "--model", model, "--json").stdout)
    assert [source["name"] for source in added["added"]] == [str(path) for path in files]
    assert all(source["complete"] and source["tokens"] > 0 for source in added["added"])

    listed = json.loads(run("memory", "list", store, "--json").stdout)
    assert listed["sources"] == added["added"]
    assert listed["blocks"] == sum(source["blocks"] for source in listed["sources"])
    assert "c.pdf" in run("memory", "list", store).stdout

    found = json.loads(run("memory", "search", store, "heron in the reeds", "-n", "3", "--json").stdout)
    assert len(found) == 3
    texts = {str(path): read_document(path) for path in files}
    for passage in found:  # the model of the store is used; a passage is part of its source
        assert passage["text"].strip()[:8] in texts[passage["source"]]

    again = json.loads(run("memory", "add", store, files[0], "--json").stdout)
    assert [source["number"] if "number" in source else source["branch"] for source in again["added"]] == [4]
    assert [s["branch"] for s in json.loads(run("memory", "list", store, "--json").stdout)["sources"]] == [2, 3, 4]

    removed = json.loads(run("memory", "rm", store, "2", str(files[2]), "--json").stdout)
    assert removed["removed"] == [3, 2]
    compacted = json.loads(run("memory", "compact", store, "--json").stdout)
    assert compacted["bytes_after"] < compacted["bytes_before"]
    assert json.loads(run("memory", "verify", store, "--json").stdout)["damaged"] == []
    with (store / "blocks.bin").open("r+b") as file:
        file.write(b"damage")
    assert "1 damaged" in run("memory", "verify", store, code=1).stderr


def test_chat_recalls_and_remembers(model: Path, notes: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run("memory", "add", store, notes / "a.txt", "--model", model)
    question = ("--prompt", "Where does the heron stand?", "--max-tokens", "24", "--temp", "2", "--seed", "1")
    plain = run("chat", model, *question).stdout
    recalled = run("chat", "--memory", store, *question).stdout
    assert recalled != plain
    with Store(store) as opened:  # closed by the command; what was said is a source
        assert [source.kind for source in opened.sources] == ["file", "session"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("memory", "list", "nowhere"), 1, "nowhere: no such store"),
        (("memory", "search", "nowhere", "x"), 1, "nowhere: no such store"),
        (("memory", "add", "store", "nothing.txt"), 1, "nothing.txt: no such file"),
        (("memory", "add", "store"), 2, "FILE"),
    ],
)
def test_misuse_is_told_before_a_model_is_loaded(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in run(*arguments, code=code).stderr
    assert list(tmp_path.iterdir()) == []


def test_removing_what_is_not_there_is_misuse(model: Path, notes: Path, tmp_path: Path) -> None:
    run("memory", "add", tmp_path / "s", notes / "a.txt", "--model", model)
    assert "no such source" in run("memory", "rm", tmp_path / "s", "7", code=2).stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.docx", b"x", r"\.docx is not read; known are \.txt"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text at byte 0"),
        ("a.md", b" \n", "holds no text"),
        ("a.pdf", b"no pdf at all", "is damaged or no PDF"),
    ],
)
def test_documents_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    pytest.importorskip("pypdf", reason="PDF is read by pypdf")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DocumentError, match=f"{name}: .*{message}"):
        read_document(tmp_path / name)


def test_a_saved_session_goes_on_with_its_storage(model: Path, tmp_path: Path) -> None:
    lm = be.load(model)

    def remembering(name: str) -> WithStorage:
        folder = tmp_path / name
        model_is, exists = identity(lm), folder.exists()
        store = Store(folder, model_is) if exists else Store.create(folder, shape_for(lm.config), model_is)
        return WithStorage(lm, store, every=16)

    def say(session: be.Session, text: str) -> str:
        return "".join(session.say(text, max_tokens=20, temperature=2.0, seed=1))

    whole = remembering("whole")
    session = be.Session(whole)
    said = [say(session, text) for text in ("one " * 30, "two " * 30, "three")]
    whole.store.close()

    cut = remembering("cut")
    session = be.Session(cut)
    assert [say(session, text) for text in ("one " * 30, "two " * 30)] == said[:2]
    session.save(tmp_path / "saved.bmojo")
    cut.store.close()
    again = remembering("cut")
    assert say(be.Session.open(tmp_path / "saved.bmojo", again), "three") == said[2]
    assert [source.kind for source in again.store.sources] == ["session"]  # it goes on, and does not begin again
    again.store.close()
