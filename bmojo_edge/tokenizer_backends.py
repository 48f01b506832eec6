"""The two libraries that cut text into tokens, behind one face: `tokenizers` (tokenizer.json) and SentencePiece.

Strings of special tokens found in the text become those tokens, as in transformers. This module knows vocabularies;
it knows nothing of chats, of end-of-sequence rules or of the other files in a model folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from bmojo_edge.detokenizer import Stage, json_stages, sentencepiece_stages


class Backend(Protocol):
    """A vocabulary. `encode` is a whole text; `encode_continuation` a text that follows another, without a prefix."""

    size: int  # one more than the largest id
    special_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def encode_continuation(self, text: str) -> list[int]: ...

    def token(self, token_id: int) -> str | None: ...

    def token_id(self, token: str) -> int | None: ...

    def stages(self) -> list[Stage]: ...


class JsonBackend:
    """A tokenizer.json: model, normaliser, special tokens and post-processor as the file says."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        text = path.read_text(encoding="utf-8")
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # Settings of the training script, not of the text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._decoder = json.loads(text).get("decoder")
        json_stages(self._decoder)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_continuation(self, text: str) -> list[int]:
        # Some put a space before the first word of a text. After another text it must not be there:
        # encode behind a character that the text does not merge with, then drop that character.
        for before in ("\n", "a"):
            prefix, both = self.encode(before, False), self.encode(before + text, False)
            if both[: len(prefix)] == prefix:
                return both[len(prefix) :]
        return self.encode(text, False)

    def stages(self) -> list[Stage]:
        return json_stages(self._decoder)


# A second normalizer_spec {add_dummy_prefix: false}; Protocol Buffers merge it with the model's own.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceBackend:
    """A tokenizer.model, with the ids that tokenizer_config.json or added_tokens.json add to it.

    SentencePiece itself takes the text of a control token for plain text, so the text is split at them first.
    """

    def __init__(self, path: Path, added: Mapping[str, int], add_bos: bool, add_eos: bool) -> None:
        from sentencepiece import SentencePieceProcessor

        model = path.read_bytes()
        self._first = SentencePieceProcessor(model_proto=model)
        self._next = SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        self._n_pieces = self._first.vocab_size()
        kinds = (self._first.is_control, self._first.is_unknown)
        special = {self._first.id_to_piece(i): i for i in range(self._n_pieces) if any(kind(i) for kind in kinds)}
        self._added = special | dict(added)
        self._added_tokens = {i: token for token, i in self._added.items()}
        self.special_ids = frozenset(self._added.values())
        self.size = max(self._n_pieces, max(self._added.values(), default=-1) + 1)
        self.bos_id, self.eos_id = self._first.bos_id(), self._first.eos_id()  # -1 where there is none
        self._prefix = self._ids(self.bos_id) if add_bos else []
        self._suffix = self._ids(self.eos_id) if add_eos else []
        longest_first = sorted(self._added, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @staticmethod
    def _ids(token_id: int) -> list[int]:
        return [token_id] if token_id >= 0 else []

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        plain = self._special.search(text)
        start = plain.start() if plain else len(text)
        ids = self._first.encode(text[:start]) + self.encode_continuation(text[start:])
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_continuation(self, text: str) -> list[int]:
        ids: list[int] = []
        at = 0
        for found in self._special.finditer(text):
            ids += self._next.encode(text[at : found.start()])
            ids.append(self._added[found[0]])
            at = found.end()
        return ids + self._next.encode(text[at:])

    def token(self, token_id: int) -> str | None:
        if token_id in self._added_tokens:
            return self._added_tokens[token_id]
        return self._first.id_to_piece(token_id) if 0 <= token_id < self._n_pieces else None

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        token_id = self._first.piece_to_id(token)
        return token_id if self._first.id_to_piece(token_id) == token else None

    def stages(self) -> list[Stage]:
        return sentencepiece_stages(dummy_prefix=self._first.encode("a") != self._next.encode("a"))
