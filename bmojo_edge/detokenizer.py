"""From token ids to text, one id at a time: the pieces put together are the decoded text, whatever the ids.

A tokenizer's decoder is a chain of stages; each takes token strings and hands on what can no longer change, so a
character whose bytes come in several tokens appears when its last byte does. Time is linear in the number of ids.
This module knows the decoders of tokenizer.json and SentencePiece; it knows nothing of vocabularies or models.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class DecoderError(ValueError):
    """A tokenizer's decoder is of a kind this module cannot stream; the message names it."""


class Stage(Protocol):
    """One step of a decoder chain: takes a piece of text, returns the pieces that are now certain."""

    def feed(self, piece: str) -> Iterable[str]: ...

    def finish(self) -> Iterable[str]: ...


class Detokenizer:
    """Streams text from ids: `feed` each id, then `finish`; ids without a token (a padded vocabulary) are silent."""

    def __init__(self, token: Callable[[int], str | None], stages: Sequence[Stage]) -> None:
        self._token = token
        self._stages = stages

    def feed(self, token_id: int) -> str:
        """The text this id makes certain, often a whole word, sometimes nothing yet."""
        token = self._token(token_id)
        return "" if token is None else self._run([token], 0)

    def finish(self) -> str:
        """What was still held back; bytes that never became a character are U+FFFD."""
        return "".join(self._run(stage.finish(), i + 1) for i, stage in enumerate(self._stages))

    def _run(self, pieces: Iterable[str], first: int) -> str:
        for stage in self._stages[first:]:
            pieces = [out for piece in pieces for out in stage.feed(piece)]
        return "".join(pieces)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted (openai/gpt-2, src/encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


class ByteLevel:
    """Each token spells bytes in GPT-2's alphabet; together they are UTF-8. A token outside the alphabet is itself."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, piece: str) -> Iterable[str]:
        try:
            data = bytes([_BYTE_OF[c] for c in piece])
        except KeyError:
            data = piece.encode()
        yield self._utf8.decode(data)

    def finish(self) -> Iterable[str]:
        yield self._utf8.decode(b"", final=True)


def _one_per_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("bmojo_one_per_byte", _one_per_byte)


class ByteFallback:
    """Runs of tokens such as <0xE4> are bytes of UTF-8; a byte that belongs to no character is U+FFFD.

    So does SentencePiece. The tokenizers library turns a whole run into U+FFFD when one byte of it is wrong, which
    would mean holding back every character of a run to its end.
    """

    _BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("bmojo_one_per_byte")

    def feed(self, piece: str) -> Iterable[str]:
        byte = self._BYTE.fullmatch(piece)
        if byte:
            yield self._utf8.decode(bytes.fromhex(byte[1]))
        else:
            yield from self.finish()
            yield piece

    def finish(self) -> Iterable[str]:
        yield self._utf8.decode(b"", final=True)
        self._utf8.reset()


class Replace:
    """Every occurrence of a string within a token becomes another."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def feed(self, piece: str) -> Iterable[str]:
        yield piece.replace(self._old, self._new)

    def finish(self) -> Iterable[str]:
        return ()


class Metaspace:
    """The replacement character is a space, but dropped from the first token where the encoder prepended one."""

    def __init__(self, replacement: str, prepended: bool) -> None:
        self._replacement = replacement
        self._first = prepended

    def feed(self, piece: str) -> Iterable[str]:
        yield piece.replace(self._replacement, "" if self._first else " ")
        self._first = False

    def finish(self) -> Iterable[str]:
        return ()


class StripStart:
    """Up to `count` leading `character`s of the whole text are dropped."""

    def __init__(self, character: str, count: int) -> None:
        self._character, self._left = character, count

    def feed(self, piece: str) -> Iterable[str]:
        while self._left and piece:
            if piece[0] != self._character:
                self._left = 0
                break
            piece, self._left = piece[1:], self._left - 1
        yield piece

    def finish(self) -> Iterable[str]:
        return ()


class Spaced:
    """No decoder at all: tokens are words, put together with spaces."""

    def __init__(self) -> None:
        self._separator = ""

    def feed(self, piece: str) -> Iterable[str]:
        yield self._separator + piece
        self._separator = " "

    def finish(self) -> Iterable[str]:
        return ()


def sentencepiece_stages(dummy_prefix: bool) -> list[Stage]:
    """The decoder of a SentencePiece model."""
    stages: list[Stage] = [Replace("▁", " "), ByteFallback()]
    return [*stages, StripStart(" ", 1)] if dummy_prefix else stages


def json_stages(decoder: Mapping[str, Any] | None) -> list[Stage]:
    """Fresh stages for the `decoder` of a tokenizer.json. Raises DecoderError naming a kind that cannot be streamed."""
    if decoder is None:
        return [Spaced()]
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    stages: list[Stage] = []
    fused = False  # after a fusing stage, pieces are fragments of one text and no longer tokens
    for part in parts:
        kind = part["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "ByteLevel" and not fused:
            stages.append(ByteLevel())
            fused = True
        elif kind == "ByteFallback" and not fused:
            stages.append(ByteFallback())
        elif kind == "Replace" and len(part["pattern"].get("String", "")) >= 1:
            old = part["pattern"]["String"]
            if fused and len(old) > 1:
                raise DecoderError(f"decoder: Replace of {old!r} after the tokens are fused cannot be streamed")
            stages.append(Replace(old, part["content"]))
        elif kind == "Metaspace" and not fused:
            stages.append(Metaspace(part["replacement"], part.get("prepend_scheme", "always") != "never"))
        elif kind == "Strip" and fused and not part.get("stop"):
            stages.append(StripStart(part["content"], part["start"]))
        else:
            raise DecoderError(f"decoder: {part} cannot be streamed")
    return stages
