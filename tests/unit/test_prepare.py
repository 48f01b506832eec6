"""From text to a prepared data folder: what is kept, what is refused; the number of processes shows nowhere."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from bmojo_edge import prepare as preparation
from bmojo_edge import sources, vocabulary
from bmojo_edge.cli import app
from bmojo_edge.dataset import Dataset, DatasetError
from bmojo_edge.encode import Encoder, frame
from bmojo_edge.prepare import Prepared, Settings, prepare
from bmojo_edge.sources import PIECE, SourceError, cut
from bmojo_edge.tensors import CheckpointError
from bmojo_edge.tokenizer import Tokenizer
from bmojo_edge.vocabulary import VocabularyError, sample

TEXTS = [
    "First line of a small text.\nThe second line, naïve café, 1234 £5.\n",
    "  Indented, and\ttabbed\n\n\nThree line ends before this.",
    "中文字符 and 😀 are bytes to a small vocabulary.",
    "The quick brown fox jumps over the lazy dog. " * 40,
    "The sea, the sea runs to the river.\r\nAnd back.",
] * 4


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of 420 pieces learnt from TEXTS."""
    folder = tmp_path_factory.mktemp("vocabulary")
    vocabulary.train(TEXTS, 420, folder)
    return folder


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": n, key: text}) + "\n" for n, text in enumerate(texts)))
    return path


def make(out: Path, *names: Path | str, tokenizer: Path | None, jobs: int = 1, **settings: Any) -> Prepared:
    return prepare([str(name) for name in names], out, Settings(**settings), tokenizer, jobs)


def texts_of(folder: Path) -> list[str]:
    """The documents of a folder as text, its own tokenizer's; the frame around each is checked and taken off."""
    data, tokenizer = Dataset.open(folder), Tokenizer.load(folder)
    found = []
    for n in range(data.n_documents):
        ids = data.document(n).tolist()
        assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids[1:-1])
        found.append(tokenizer.decode(ids[1:-1]))
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- what is kept -----------------------------------------------------------------------------------------------------


def _write_xz(path: Path, content: bytes) -> Path:
    return _written(path.with_name(path.name + ".xz"), lzma.compress(content))


def _write_gz(path: Path, content: bytes) -> Path:  # two members, as `cat a.gz b.gz` makes
    half = len(content) // 2
    return _written(path.with_name(path.name + ".gz"), gzip.compress(content[:half]) + gzip.compress(content[half:]))


def _write_zst(path: Path, content: bytes) -> Path:  # two frames
    import zstandard

    half, c = len(content) // 2, zstandard.ZstdCompressor()
    return _written(path.with_name(path.name + ".zst"), c.compress(content[:half]) + c.compress(content[half:]))


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("store", [_written, _write_xz, _write_gz, _write_zst], ids=["plain", "xz", "gz", "zst"])
def test_every_document_comes_back_exactly(
    tmp_path: Path, tokenizer: Path, store: Callable[[Path, bytes], Path]
) -> None:
    source = store(tmp_path / "texts.jsonl", write_jsonl(tmp_path / "plain.jsonl", TEXTS).read_bytes())
    made = make(tmp_path / "out", source, tokenizer=tokenizer)
    assert texts_of(tmp_path / "out") == TEXTS
    data = Dataset.open(tmp_path / "out")
    assert (made.n_documents[""], made.n_tokens[""]) == (data.n_documents, data.n_tokens)
    assert data.vocab_size == 420 and data.tokens.dtype == "<u2"
    assert data.info["sources"][0]["bytes"] == source.stat().st_size


def test_text_files_folders_and_parquet(tmp_path: Path, tokenizer: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "in"
    (folder / "b" / ".hidden").mkdir(parents=True)
    (folder / "b" / "two.txt").write_bytes("\ufeffSecond, with a mark.\r\nIts line ends stay.".encode())
    (folder / "a.md").write_text("First.")
    (folder / "b" / ".hidden" / "x.txt").write_text("Never.")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "empty.txt").write_text(" \n ")
    table = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"n": range(600), "text": [f"Row {n}." for n in range(600)]}), table)
    made = make(tmp_path / "out", folder, table, tokenizer=tokenizer)
    assert texts_of(tmp_path / "out") == [
        "First.",
        "Second, with a mark.\r\nIts line ends stay.",
        *(f"Row {n}." for n in range(600)),
    ]
    assert made.empty_documents == 1 and made.passed_over == [str(folder / "picture.png")]


def test_data_sets_of_the_datasets_library(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = {"body": ["One.", "", "Two."]}
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows)})
    splits.save_to_disk(tmp_path / "both")
    splits["test"].save_to_disk(tmp_path / "single")
    for name, split in (("both", "test"), ("single", "train")):
        made = make(tmp_path / f"from {name}", tmp_path / name, tokenizer=tokenizer, text_key="body", split=split)
        assert texts_of(tmp_path / f"from {name}") == ["One.", "Two."] and made.empty_documents == 1
    with pytest.raises(SourceError, match=r"both: has no split 'train', only test"):
        make(tmp_path / "x", tmp_path / "both", tokenizer=tokenizer)

    asked: list[Any] = []

    def load_dataset(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return iter([{"text": "From afar."}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    make(tmp_path / "hub", "owner/texts", tokenizer=tokenizer, split="validation")
    assert asked == [("owner/texts", {"split": "validation", "streaming": True})]
    assert texts_of(tmp_path / "hub") == ["From afar."]
    monkeypatch.undo()
    with pytest.raises(SourceError, match=r"owner/texts: cannot be opened as a data set"):  # tests are offline
        make(tmp_path / "x", "owner/texts", tokenizer=tokenizer)


def test_jobs_and_sizes_of_reads_show_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "".join(f"Line {n} of a long text, {n * n}." + "\n" * (n % 3) for n in range(1000))
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.txt").write_text(long)
    names = (tmp_path / "a.jsonl", tmp_path / "b.txt")
    make(tmp_path / "whole", *names, tokenizer=None, train_vocab=380, val=0.2)
    for module in (sources, preparation):  # many pieces and tasks
        monkeypatch.setattr(module, "PIECE", 2000)
    make(tmp_path / "one", *names, tokenizer=None, train_vocab=380, val=0.2)
    monkeypatch.setattr(sources, "BLOCK", 1013)
    make(tmp_path / "two", *names, tokenizer=None, train_vocab=380, val=0.2, jobs=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert texts_of(tmp_path / "one" / "train")[-1] == long
    for part in ("train", "val"):  # cuts between lines change no token; the vocabulary was learnt from pieces
        tokens = [files_of(tmp_path / run / part)["tokens.bin"] for run in ("whole", "one")]
        assert tokens[0] == tokens[1]


def test_parts(tmp_path: Path, tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"Text number {n}." for n in range(40)])
    make(tmp_path / "out", source, tokenizer=tokenizer, val=0.1)
    train, val = (texts_of(tmp_path / "out" / part) for part in ("train", "val"))
    assert val == [f"Text number {n}." for n in (4, 14, 24, 34)]
    assert sorted(train + val) == sorted(f"Text number {n}." for n in range(40))
    with pytest.raises(DatasetError, match=r"--val: 0.001 of 40 documents leaves the part 'val' empty"):
        make(tmp_path / "none", source, tokenizer=tokenizer, val=0.001)


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_one_document_alone_is_cut(tmp_path: Path, tokenizer: Path, share: float) -> None:
    text = "".join(f"Sentence {n} of one text. " for n in range(100))
    (tmp_path / "a.txt").write_text(text)
    make(tmp_path / "whole", tmp_path / "a.txt", tokenizer=tokenizer)
    make(tmp_path / "out", tmp_path / "a.txt", tokenizer=tokenizer, val=share)
    whole = Dataset.open(tmp_path / "whole").tokens.tolist()
    train, val = (Dataset.open(tmp_path / "out" / part).tokens.tolist() for part in ("train", "val"))
    assert train + val == whole and len(val) == round(len(whole) * share)


def test_documents_end_as_asked(tmp_path: Path, tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["One.", "Two."])
    end = Tokenizer.load(tokenizer).eos_id
    lengths = {}
    for eos in (None, True, False):
        make(tmp_path / str(eos), source, tokenizer=tokenizer, eos=eos)
        data = Dataset.open(tmp_path / str(eos))
        assert (data.document(0)[-1] == end) == (eos is not False)
        lengths[eos] = data.n_tokens
    assert lengths[None] == lengths[True] == lengths[False] + 2


def test_tokenizers_given(tmp_path: Path, tokenizer: Path, byte_level_folder: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["One. <|im_end|>", "Two."])
    make(tmp_path / "folder", source, tokenizer=byte_level_folder)
    make(tmp_path / "file", source, tokenizer=byte_level_folder / "tokenizer.json")
    assert files_of(tmp_path / "folder") == files_of(tmp_path / "file")
    ours = Tokenizer.load(tmp_path / "folder")
    assert Dataset.open(tmp_path / "folder").document(0).tolist() == [*ours.encode("One. <|im_end|>"), ours.eos_id]

    (tmp_path / "mine.json").write_bytes((byte_level_folder / "tokenizer.json").read_bytes())
    make(tmp_path / "alone", source, tokenizer=tmp_path / "mine.json")
    assert Tokenizer.load(tmp_path / "alone").eos_id is None
    with pytest.raises(DatasetError, match="--eos: the tokenizer's files name no eos_token"):
        make(tmp_path / "x", source, tokenizer=tmp_path / "mine.json", eos=True)
    make(tmp_path / "model", source, tokenizer=tokenizer / "tokenizer.model")
    assert texts_of(tmp_path / "model")[1] == "Two."
    (tmp_path / "broken.json").write_text("{}")
    for wrong, message in (
        ("nowhere", "no such tokenizer"),
        ("a.jsonl", "must be a tokenizer.json"),
        ("broken.json", "cannot"),
    ):
        with pytest.raises(CheckpointError, match=message):
            make(tmp_path / "x", source, tokenizer=tmp_path / wrong)


def test_a_post_processor_is_taken_apart(metaspace_folder: Path) -> None:
    ours = Tokenizer.load(metaspace_folder)
    found = frame(ours, eos=None)
    assert [*found.before, *ours.encode("a", add_special_tokens=False)] == ours.encode("a")
    assert found.after == [ours.eos_id] and frame(ours, eos=False).after == []


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def test_a_learnt_vocabulary_is_transformers_too(tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(tokenizer), AutoTokenizer.from_pretrained(tokenizer)
    assert ours.vocab_size == 420 == len(theirs)
    for text in TEXTS[:5]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text


def test_sizes_no_vocabulary_can_have(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match=r"--train-vocab: 100 pieces are too few: .* alone need \d{3}"):
        vocabulary.train(TEXTS, 100, tmp_path)
    with pytest.raises(VocabularyError, match=r"--train-vocab: 90000 pieces are too many: .* no more than \d+"):
        vocabulary.train(TEXTS, 90_000, tmp_path)
    with pytest.raises(VocabularyError, match="no text to learn from"):
        vocabulary.train([" \n"], 300, tmp_path)


def test_a_sample_is_even_and_bounded() -> None:
    texts = ["".join(f"{n:05}\n" for n in range(begin, begin + 100)) for begin in range(0, 10_000, 100)]
    numbers = [int(line) for line in sample(iter(texts), 4000)]
    assert 400 < len(numbers) <= 800 and numbers[0] == 0 and numbers[-1] > 9900
    assert len({b - a for a, b in itertools.pairwise(numbers)}) == 1
    assert sample(["x" * 2500 + " y\n\nz"], 10_000) == ["x" * 1000, "x" * 1000, "x" * 500 + " y", "z"]


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1 << 10, PIECE - 1, PIECE, 10 * PIECE])
@pytest.mark.parametrize("text", ["a b\n\nc d\n" * 90_000, "ab " * 200_000, "x" * 600_000, ""])
def test_pieces_are_the_text_and_bounded(text: str, step: int) -> None:
    parts = [text[i : i + step] for i in range(0, len(text), step)]
    found = list(cut(parts))
    assert found == list(cut([text]))
    assert "".join(piece.text for piece in found) == text and max(len(piece.text) for piece in found) <= PIECE
    assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
    if "\n" in text:
        assert all(a.text.endswith("d\n") and b.text.startswith("a") for a, b in itertools.pairwise(found))


def test_continuing_pieces_are_encoded_as_the_whole(tokenizer: Path, byte_level_folder: Path) -> None:
    from bmojo_edge.encode import Part

    text = "The river runs.\nThe sea, 5 km off.\n\n  Hello"
    for folder in (tokenizer, byte_level_folder):
        encode = Encoder(folder, eos=False)
        at = text.index("\n") + 1
        two = encode([Part(text[:at], True, False), Part(text[at:], False, True)])
        one = encode([Part(text, True, True)])
        assert two.data == one.data and sum(two.counts) == one.counts[0]


# --- what is refused --------------------------------------------------------------------------------------------------

BAD_LINES = {
    "not JSON": ('{"text": "cut', r"a\.jsonl:2: is not valid JSON"),
    "a list": ("[1]", r"a\.jsonl:2: holds list, not an object"),
    "no such field": ('{"body": "x"}', r"a\.jsonl:2: has no field 'text', only 'body' \(see --text-key\)"),
    "a number": ('{"text": 5}', r"a\.jsonl:2: field 'text' is int, not a string"),
    "null": ('{"text": null}', r"a\.jsonl:2: field 'text' is NoneType"),
    "a surrogate": (r'{"text": "\ud800"}', r"a\.jsonl:2: field 'text' is not valid Unicode at character 0"),
    "latin-1": (b'{"text": "caf\xe9"}', r"a\.jsonl:2: is not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_named_or_counted(tmp_path: Path, tokenizer: Path, name: str) -> None:
    bad, message = BAD_LINES[name]
    line = bad if isinstance(bad, bytes) else bad.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "Good."}\n' + line + b'\n\n{"text": "Also."}')
    with pytest.raises(SourceError, match=message):
        make(tmp_path / "out", tmp_path / "a.jsonl", tokenizer=tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
    made = make(tmp_path / "out", tmp_path / "a.jsonl", tokenizer=tokenizer, skip_bad=True)
    assert texts_of(tmp_path / "out") == ["Good.", "Also."] and made.bad_lines == 1
    assert "a.jsonl:2" in made.first_bad[0]


def _damaged(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    good = b'{"text": "Good."}\n' * 500
    compressed = {"xz": lzma.compress, "gz": gzip.compress}
    if name.endswith("zst"):
        import zstandard

        content = zstandard.ZstdCompressor().compress(good)
    else:
        content = compressed[name.rsplit(".")[-1]](good)
    return _written(path, content[:-6] if "short" in name else b"\0" * 8 + content[8:])


@pytest.mark.parametrize("name", [f"{how}.jsonl.{kind}" for how in ("short", "wrong") for kind in ("xz", "gz", "zst")])
def test_damaged_archives_are_named(tmp_path: Path, tokenizer: Path, name: str) -> None:
    with pytest.raises(SourceError, match=rf"{name}: truncated or damaged"):
        make(tmp_path / "out", _damaged(tmp_path, name), tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_other_sources_that_cannot_be_read(tmp_path: Path, tokenizer: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "latin.txt").write_bytes(b"one\ntwo caf\xe9\n")
    (tmp_path / "half.txt").write_bytes("one\ncafé".encode()[:-1])
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "none").mkdir()
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "body.parquet")
    for name, message in {
        "latin.txt": r"latin\.txt:2: is not UTF-8 text",
        "half.txt": r"half\.txt:2: is not UTF-8 text",
        "x.csv": r"x\.csv: is of an unknown kind; known are \.txt",
        "none": "none: nothing in this folder can be read",
        "absent": "absent: no such file or folder",
        "blank.jsonl": r"the sources hold no text \(1 empty documents\)",
        "bad.parquet": r"bad\.parquet: truncated or damaged",
        "body.parquet": r"body\.parquet: has no column 'text', only 'body'",
    }.items():
        with pytest.raises((SourceError, DatasetError), match=message):
            make(tmp_path / "out", tmp_path / name, tokenizer=tokenizer)
        assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(tmp_path: Path, tokenizer: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["One.", "Two."])
    out = tmp_path / "out"
    make(out, source, tokenizer=tokenizer)
    before = files_of(out)
    with pytest.raises(DatasetError, match=r"out: exists; .*--overwrite"):
        make(out, source, tokenizer=tokenizer)
    assert files_of(out) == before
    prepare([str(source)], out, Settings(val=0.5), tokenizer, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["train", "val"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match=r"notes\.txt: is no part of prepared data and would be lost"):
        prepare([str(source)], out, Settings(), tokenizer, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(DatasetError, match="not a prepared data folder, so it is not replaced"):
        prepare([str(source)], tmp_path / "other", Settings(), tokenizer, overwrite=True)
    assert (tmp_path / "other" / "thesis.tex").read_text() == "mine"


def _at_work(tmp_path: Path, tokenizer: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A preparation with two processes that has begun to write and has long to go."""
    source, out = tmp_path / "a.jsonl", tmp_path / "out" / "data"
    with source.open("w") as file:
        for n in range(60_000):
            file.write(json.dumps({"text": f"Text {n} " + "of many words " * 20}) + "\n")
    command = [sys.executable, "-c", "from bmojo_edge.cli import main; main()", "data", "prepare", str(source)]
    command += ["--out", str(out), "--tokenizer", str(tokenizer), "--jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in out.parent.glob(".data.tmp-*/tokens.bin")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process, out


def test_ctrl_c_leaves_nothing(tmp_path: Path, tokenizer: Path) -> None:
    process, out = _at_work(tmp_path, tokenizer)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told.decode()
    assert b"Traceback" not in told
    assert list(out.parent.iterdir()) == []


def test_a_kill_leaves_no_process_and_nothing_under_the_name(tmp_path: Path, tokenizer: Path) -> None:
    process, out = _at_work(tmp_path, tokenizer)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive and not out.exists()
    make(out, write_jsonl(tmp_path / "b.jsonl", TEXTS), tokenizer=tokenizer)
    assert [p.name for p in out.parent.iterdir()] == ["data"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, " "], key="body")
    run, out = CliRunner(), tmp_path / "out"
    command = ["data", "prepare", str(source), "--out", str(out), "--text-key", "body", "--jobs", "1"]
    result = run.invoke(app, [*command, "--train-vocab", "400", "--val", "0.25", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["vocab_size"] == 400 and told["empty_documents"] == 1 and told["tokens_per_s"] > 0
    for part in ("train", "val"):
        data = Dataset.open(told["parts"][part]["folder"])
        assert data.n_tokens == told["parts"][part]["n_tokens"]
    for options, message in (([], "--train-vocab"), (["--train-vocab", "9", "--tokenizer", "x"], "--tokenizer")):
        result = run.invoke(app, [*command, *options])
        assert result.exit_code == 2 and message in result.stderr
    result = run.invoke(app, [*command, "--train-vocab", "400"])
    assert result.exit_code == 1 and "--overwrite" in result.stderr


@pytest.mark.parametrize(
    ("package", "name"), [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet"), ("datasets", "a/b")]
)
def test_a_missing_extra_is_named(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    if package != "datasets":
        (tmp_path / name).write_bytes(b"")
    result = CliRunner().invoke(
        app, ["data", "prepare", name, "--out", "out", "--tokenizer", str(tokenizer), "-j", "1"]
    )
    assert result.exit_code == 1 and "pip install 'bmojo-edge[data]'" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()
