"""The tokenizer of a model folder: text to ids and back, chats through the model's template, where an answer ends.

It reads tokenizer.json or tokenizer.model, tokenizer_config.json, special_tokens_map.json, added_tokens.json,
chat_template.jinja, generation_config.json and config.json. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from bmojo_edge import chat_template
from bmojo_edge.chat_template import ChatTemplateError, Message
from bmojo_edge.detokenizer import DecoderError, Detokenizer
from bmojo_edge.tensors import CheckpointError, read_json
from bmojo_edge.tokenizer_backends import Backend, JsonBackend, SentencePieceBackend

FILES = ("tokenizer.json", "tokenizer.model")


class TokenizerError(ValueError):
    """A text or ids are not what a tokenizer can take; the message names the argument."""


class Tokenizer:
    """Text to ids and back. Make one with `Tokenizer.load(folder)`.

    `eos_ids` are all ids that end an answer; `eos_id` ends a text and `bos_id` begins one, None where there is no such;
    `vocab_size` is one more than the largest id.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, Any] | None = None,
        eos_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._backend = backend
        self._folder = folder
        self._special_tokens = dict(special_tokens or {})
        self._templates = dict(chat_templates or {})
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.eos_ids = frozenset(eos_ids) | frozenset(() if self.eos_id is None else (self.eos_id,))
        self.vocab_size = backend.size

    @property
    def folder(self) -> Path | None:
        """Where it was loaded from."""
        return self._folder

    def _special_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return self._backend.token_id(token) if token is not None else None

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The tokenizer in a model folder.

        Raises CheckpointError naming the file that is missing, damaged or of an unknown kind.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(folder, config)
        path = next((folder / name for name in FILES if (folder / name).is_file()), None)
        if path is None:
            raise CheckpointError(f"{folder}: has no tokenizer; expected {' or '.join(FILES)}")
        try:
            if path.name == "tokenizer.json":
                backend = JsonBackend(path)
            else:
                backend = SentencePieceBackend(
                    path,
                    _added_tokens(folder, config),
                    config.get("add_bos_token", True),
                    config.get("add_eos_token", False),
                )
                for name, token_id in (("bos_token", backend.bos_id), ("eos_token", backend.eos_id)):
                    if token_id >= 0:
                        special.setdefault(name, backend.token(token_id))
        except DecoderError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # both libraries raise bare Exception or RuntimeError on a damaged file
            raise CheckpointError(f"{path}: cannot be read as a tokenizer ({error})") from error
        return cls(backend, special, _eos_ids(folder), _chat_templates(folder, config), folder)

    def save(self, folder: str | Path) -> None:
        """Copy the files this tokenizer was loaded from into another model folder."""
        from bmojo_edge.checkpoint import copy_tokenizer

        if self._folder is None:
            raise TokenizerError("this tokenizer was not loaded from a folder, so there are no files to copy")
        copy_tokenizer(self._folder, Path(folder))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; `add_special_tokens` puts what the model expects around it (often a first token), if any."""
        try:
            return self._backend.encode(_valid(text), add_special_tokens)
        except TypeError as error:
            raise TokenizerError(f"text: {error}") from None

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows another: no special tokens around it, no space put before its first word."""
        return self._backend.encode_continuation(_valid(text))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ids. Incomplete or invalid bytes are U+FFFD; ids beyond the vocabulary are silent."""
        stream = self.detokenizer(skip_special_tokens)
        return "".join([*(stream.feed(int(i)) for i in ids), stream.finish()])

    def detokenizer(self, skip_special_tokens: bool = False) -> Detokenizer:
        """A fresh stream from ids to text; all it yields together is what `decode` gives."""
        return Detokenizer(self._visible if skip_special_tokens else self._token, self._backend.stages())

    def _token(self, token_id: int) -> str | None:
        if token_id < 0:
            raise TokenizerError(f"ids: must not be negative, got {token_id}")
        return self._backend.token(token_id)

    def _visible(self, token_id: int) -> str | None:
        return None if token_id in self._backend.special_ids else self._token(token_id)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        return bool(self._templates)

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation; `variables` are the template's own switches. Raises ChatTemplateError."""
        if not self._templates:
            raise ChatTemplateError(
                "this model has no chat template: give a plain prompt instead of messages, "
                "or put a chat_template.jinja into its folder"
            )
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ChatTemplateError(f"chat_template: none is named 'default', only {', '.join(self._templates)}")
        variables = {
            **self._special_tokens,
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            **variables,
        }
        return chat_template.render(self._templates[name], messages, **variables)

    def chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Ids of a conversation, by the model's own template; the same that transformers' apply_chat_template gives."""
        return self.encode(
            self.render_chat(messages, add_generation_prompt, tools, **variables), add_special_tokens=False
        )


def _valid(text: str) -> str:
    if not isinstance(text, str):
        raise TokenizerError(f"text: must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"text: is not valid Unicode at character {error.start} (a lone surrogate)") from None
    return text


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    return read_json(path) if path.is_file() else {}


def _content(token: object) -> object:
    """A token's string, whether written plainly or as an object with its properties."""
    return token.get("content") if isinstance(token, Mapping) else token


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token, eos_token, ... as templates read them."""
    found: dict[str, Any] = {}
    for source in (_read_json(folder / "special_tokens_map.json"), config):
        for name, value in source.items():
            if name.endswith("_token") and isinstance(_content(value), str):
                found[name] = _content(value)
    return found


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Tokens that a SentencePiece folder adds to its model."""
    added = dict(_read_json(folder / "added_tokens.json"))
    for token_id, token in config.get("added_tokens_decoder", {}).items():
        added[str(_content(token))] = int(token_id)
    return added


def _eos_ids(folder: Path) -> set[int]:
    """Every id that generation_config.json or config.json calls an end of sequence."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise CheckpointError(f"{folder / name}: eos_token_id: must be an id or a list of ids, got {value!r}")
            found.add(token_id)
    return found


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; a file of its own wins over tokenizer_config.json, as in transformers."""
    own = folder / "chat_template.jinja"
    given = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(given, str):
        templates = {"default": given}
    elif isinstance(given, list):
        templates = {str(entry["name"]): str(entry["template"]) for entry in given}
    elif given is not None:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template: must be a string or a list, got {given!r}"
        )
    if own.is_file():
        templates["default"] = own.read_text(encoding="utf-8")
    return templates
