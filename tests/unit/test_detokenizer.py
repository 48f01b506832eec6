"""Streamed pieces put together are the decoded text, for any ids, and characters appear as soon as they are whole."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders

from bmojo_edge.detokenizer import _BYTE_OF, REPLACEMENT, DecoderError, Detokenizer, json_stages
from bmojo_edge.tokenizer import Tokenizer
from tests.unit import tokenizer_folders

FOLDERS = ["byte_level_folder", "sentencepiece_folder", "metaspace_folder", "smollm2_folder"]
# Few characters, many of them several bytes long, so that short random texts are hard ones.
TEXTS = st.text(st.sampled_from(" \n\tahe▁é中😀👩\u200d�ñ�ٱ.<0x41>"), max_size=30) | st.text(max_size=20)


def lacking(tokenizer: Tokenizer) -> set[int]:
    """Bytes that a byte-level vocabulary has no token for; SmolLM2's has none for some control characters."""
    if tokenizer._backend.token_id("Ġ") is None:
        return set()
    return {byte for character, byte in _BYTE_OF.items() if tokenizer._backend.token_id(character) is None}


def pieces(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = False) -> list[str]:
    stream = tokenizer.detokenizer(skip_special_tokens)
    return [*(stream.feed(i) for i in ids), stream.finish()]


@pytest.fixture(scope="module", params=FOLDERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.load(request.getfixturevalue(request.param))


@given(data=st.data())
def test_pieces_are_decode_for_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=40))
    skip = data.draw(st.booleans())
    assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@given(text=TEXTS)
def test_text_comes_back_and_nothing_is_shown_before_it_is_certain(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("▁", "_").lstrip(" ")  # SentencePiece cannot tell them from what it writes for a space itself
    assume(not lacking(tokenizer) & set(text.encode()))
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == text
    shown = ""
    for part in parts:
        shown += part
        assert text.startswith(shown)  # so no U+FFFD stands where the text has none


@pytest.fixture(scope="module", params=["byte_level_folder", "smollm2_folder"])
def byte_level(request: pytest.FixtureRequest) -> tuple[Tokenizer, Library]:
    folder = request.getfixturevalue(request.param)
    return Tokenizer.load(folder), Library.from_file(str(folder / "tokenizer.json"))


@given(data=st.data())
def test_byte_level_is_the_library_for_any_ids(byte_level: tuple[Tokenizer, Library], data: st.DataObject) -> None:
    ours, theirs = byte_level
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=40))
    assert "".join(pieces(ours, ids)) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


@given(data=st.data())
def test_byte_fallback_is_sentencepiece_for_any_ids(sentencepiece_folder: Path, data: st.DataObject) -> None:
    from sentencepiece import SentencePieceProcessor

    ours = Tokenizer.load(sentencepiece_folder)
    theirs = SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    plain = [i for i in range(ours.vocab_size) if not theirs.is_control(i) and not theirs.is_unknown(i)]
    ids = data.draw(st.lists(st.sampled_from(plain), max_size=40))
    assert "".join(pieces(ours, ids)) == theirs.decode(ids)


@given(text=TEXTS, data=st.data())
def test_byte_fallback_is_the_library_where_bytes_are_characters(
    metaspace_folder: Path, text: str, data: st.DataObject
) -> None:
    ours, theirs = Tokenizer.load(metaspace_folder), Library.from_file(str(metaspace_folder / "tokenizer.json"))
    ids = ours.encode(text)
    ids[data.draw(st.integers(0, len(ids))) :] += [1, 2]  # special tokens among them
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)


@given(tokens=st.lists(st.text(st.sampled_from("▁ab "), max_size=4), max_size=8), data=st.data())
def test_other_decoders_are_the_library_too(tokens: list[str], data: st.DataObject) -> None:
    decoder = data.draw(
        st.sampled_from(
            [
                decoders.Metaspace(),
                decoders.Metaspace(prepend_scheme="never"),
                decoders.Metaspace(prepend_scheme="first"),
                decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
                decoders.Sequence([decoders.Replace("ab", "▁"), decoders.Metaspace()]),
                decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "bb")]),
            ]
        )
    )
    import json

    stream = Detokenizer(tokens.__getitem__, json_stages(json.loads(decoder.__getstate__())))
    ours = "".join([*(stream.feed(i) for i in range(len(tokens))), stream.finish()])
    assert ours == decoder.decode(tokens)


def test_no_decoder_puts_spaces_between_words() -> None:
    stream = Detokenizer(["a", "b", "c"].__getitem__, json_stages(None))
    assert [stream.feed(0), stream.feed(1), stream.feed(2), stream.finish()] == ["a", " b", " c", ""]


def test_a_character_in_four_tokens_appears_with_its_last_byte(sentencepiece_folder: Path) -> None:
    tokenizer = Tokenizer.load(sentencepiece_folder)
    ids = tokenizer.encode("a😀😀b", add_special_tokens=False)[1:]
    assert len(ids) == 9
    assert pieces(tokenizer, ids) == ["", "", "", "😀", "", "", "", "😀", "b", ""]


def test_what_never_becomes_a_character_is_replaced_when_that_is_certain(byte_level_folder: Path) -> None:
    tokenizer = Tokenizer.load(byte_level_folder)
    first_two = tokenizer.encode("\U0001f600", add_special_tokens=False)[:2]
    letter = tokenizer.encode("x", add_special_tokens=False)
    assert pieces(tokenizer, first_two) == ["", "", REPLACEMENT]
    assert pieces(tokenizer, first_two + letter) == ["", "", REPLACEMENT + "x", ""]


def test_a_real_replacement_character_is_shown_at_once(byte_level_folder: Path) -> None:
    tokenizer = Tokenizer.load(byte_level_folder)
    ids = tokenizer.encode(REPLACEMENT, add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids)[:-1]) == REPLACEMENT


@pytest.mark.parametrize("unit", ["the river ", "😀", "\n"])
def test_time_is_linear(sentencepiece_folder: Path, unit: str) -> None:
    tokenizer = Tokenizer.load(sentencepiece_folder)

    def seconds(repeats: int) -> float:
        ids = tokenizer.encode(unit, add_special_tokens=False) * repeats
        stream, start = tokenizer.detokenizer(), time.perf_counter()
        for i in ids:
            stream.feed(i)
        return time.perf_counter() - start

    seconds(100)
    small, large = min(seconds(500) for _ in range(5)), min(seconds(8000) for _ in range(3))
    assert large < 16 * small * 6  # quadratic would be 16 times that line


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.WordPiece(),
        decoders.Strip(" ", 1, 0),
        decoders.Sequence([decoders.Fuse(), decoders.Metaspace()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
    ],
)
def test_a_decoder_that_cannot_be_streamed_is_named(decoder: decoders.Decoder) -> None:
    import json

    with pytest.raises(DecoderError, match="decoder: "):
        json_stages(json.loads(decoder.__getstate__()))


def test_unigram_models_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_folders.sentencepiece(tmp_path, "unigram"))
    for text in ("Hello, how are you?", " the  river", "naïve 😀\n\n", ""):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(pieces(tokenizer, ids)) == text == tokenizer.decode(ids)
