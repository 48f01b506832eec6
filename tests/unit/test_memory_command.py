"""`bmojo-edge memory` and `chat --memory`: files go in, are found, listed, removed, checked; a chat recalls them."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import bmojo_edge as be
from bmojo_edge import checkpoint
from bmojo_edge.cli import app
from bmojo_edge.config import Config
from bmojo_edge.documents import DocumentError, read_document
from bmojo_edge.inspection import inspect
from bmojo_edge.recall import WithStorage, shape_for
from bmojo_edge.session_file import SessionError, identity
from bmojo_edge.storage import Store
from bmojo_edge.tokenizer import Tokenizer
from bmojo_edge.torch import load as load_torch
from tests.helpers import assert_states_equal, random_weights, to_numpy


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
        (("memory", "add", "store", "nothing.txt", "--disk-gb", "inf"), 2, "--disk-gb"),
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
        ("b.txt", None, "is a folder; name the files in it"),
        ("c.txt", b"\xef\xbb\xbf", "holds no text"),
        ("a.md", b" \n", "holds no text"),
        ("a.pdf", b"no pdf at all", "is damaged or no PDF"),
        ("caf\udce9.txt", b"coffee", "the name is not valid Unicode; rename the file"),
    ],
)
def test_documents_that_cannot_be_read_are_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    pytest.importorskip("pypdf", reason="PDF is read by pypdf")
    (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(DocumentError, match=f"{re.escape(ascii(name)[1:-1])}'?: .*{message}"):
        read_document(tmp_path / name)


def test_a_damaged_pdf_is_named_whatever_its_reader_trips_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pdf(tmp_path / "good.pdf", "Heron island")
    raw, rng = (tmp_path / "good.pdf").read_bytes(), random.Random(3)
    errors = 0
    for _ in range(60):
        damaged = bytearray(raw)
        for _ in range(rng.choice([1, 5, 20])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "a.pdf").write_bytes(damaged)
        try:
            read_document(tmp_path / "a.pdf")
        except DocumentError:
            errors += 1
    assert 5 < errors < 55
    assert capsys.readouterr().err == ""


def test_a_full_store_says_what_it_let_go_of(model: Path, notes: Path, tmp_path: Path) -> None:
    small = ("--model", model, "--disk-gb", "0.0002")
    told = run("memory", "add", tmp_path / "s", notes / "a.txt", *small)
    assert "The store is full" not in told.stderr
    (tmp_path / "long.txt").write_text("A long story of boats and herons. " * 200, encoding="utf-8")
    facts = json.loads(run("memory", "add", tmp_path / "s", tmp_path / "long.txt", "--json").stdout)
    assert facts["replaced_blocks"] > 0
    assert "The store is full" in run("memory", "add", tmp_path / "s", tmp_path / "long.txt").stderr
    assert "--disk-gb" in run("memory", "add", tmp_path / "s", notes / "a.txt", *small, code=2).stderr


def test_a_session_is_bound_to_its_store(model: Path, notes: Path, tmp_path: Path) -> None:
    stores, file = (tmp_path / "one", tmp_path / "two"), tmp_path / "s.bmojo"
    more = ("--session", file, "--max-tokens", "8", "--prompt", "The heron stands in the reeds. " * 8)
    run("chat", model, *more)  # no storage yet
    run("memory", "add", stores[0], notes / "a.txt", "--model", model)
    assert "goes on with" not in run("chat", "--memory", stores[0], *more).stderr
    assert "goes on with" not in run("chat", *more).stderr  # its own store, unasked

    with Store(stores[0]) as store:
        held = store.next_id, store.sources
    told = json.loads(run("inspect", file, "--json").stdout)
    assert told["attention"]["storage"] > 0.01
    assert abs(sum(told["attention"].values()) - 1) < 1e-4
    with Store(stores[0]) as store:
        assert (store.next_id, store.sources) == held  # looking stores nothing
    lm = be.load(model)
    with pytest.raises(SessionError, match=r"has storage in .*one; open it with that store"):
        be.Session.open(file, lm)

    assert "one" in run("chat", "--memory", stores[1], *more).stderr.partition("without what is in")[2]
    with Store(stores[1]) as store:
        assert [(source.parent, source.branch) for source in store.sources] == [(0, 1)]
    stores[1].rename(tmp_path / "three")
    assert "storage is no longer at" in run("chat", *more, code=1).stderr
    assert "storage is no longer at" in run("inspect", file, code=1).stderr
    run("inspect", file, "--memory", tmp_path / "three")
    assert "goes on with" not in run("chat", "--memory", tmp_path / "three", *more).stderr


def test_a_session_whose_model_was_moved_is_refused_before_another_is_made(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bmojo_convert.default.ensure_default_model", None)  # calling it would fail otherwise
    here, there, file = tmp_path / "here", tmp_path / "there", tmp_path / "a.bmojo"
    shutil.copytree(model, here)
    more = ("--session", file, "--max-tokens", "4", "--prompt", "Hello")
    run("chat", here, *more)
    here.rename(there)
    said = " ".join(run("chat", *more, code=1).stderr.split())
    assert f"{file}: its model is no longer at {here}; name it: bmojo-edge chat MODEL" in said
    run("chat", there, *more)


@pytest.mark.parametrize("engine", ["mlx", "torch"])
def test_what_is_looked_at_is_what_the_answer_was_read_from(
    engine: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm: Any = be.load(model) if engine == "mlx" else load_torch(model)
    with Store.create(tmp_path / "s", shape_for(lm.config), identity(lm)) as store:
        remembering = WithStorage(lm, store, every=64)
        decode, states = remembering.decode_one_token, []

        def recorded(token: Any, state: Any, active: Any = None) -> Any:
            states.append(state)
            return decode(token, state, active)

        monkeypatch.setattr(remembering, "decode_one_token", recorded)
        session = be.Session(remembering)
        for text in ("one heron " * 30, "two boats " * 40):
            states.clear()
            "".join(session.say(text, max_tokens=20, temperature=2.0, seed=1))
        held, now = store.next_id, session.moment.state
        found = inspect(session)
        assert store.next_id == held
        assert_states_equal(session.moment.state, now)

        before, ids, answer = session.last_exchange()
        first = remembering.before_answer(ids, before, now)[1]
        for layer, then in zip(first.layers, states[0].layers, strict=True):
            assert_states_equal(layer.recalled, then.recalled)  # what the prompt's end asked for
        shares = [
            lm.prefill_with_attention(np.array([[token]], np.int32), state.inner)[2]
            for token, state in zip([ids[-1], *answer[:-1]], [first, *states], strict=True)
        ]
        storage = np.mean([[to_numpy(layer["storage"]).mean() for layer in token] for token in shares])
        assert storage > 0.05
        assert abs(found.attention["storage"] - storage) < 1e-5


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
