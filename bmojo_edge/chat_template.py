"""A checkpoint's chat template: Jinja source that turns messages into the text a model was trained on.

Templates come with models from anywhere, so they run in Jinja's immutable sandbox, with the globals and filters that
templates written for transformers rely on. This module knows text only, no token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

Message = Mapping[str, Any]


class ChatTemplateError(ValueError):
    """There is no usable chat template, or it refuses these messages; the message says why."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` for templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's own: `self` may be one of the names
        self, *rest = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as Python writes it; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # the class itself would offer its methods
    }
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"chat_template: line {error.lineno}: {error.message}") from None


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as plain dicts without null entries. Raises ChatTemplateError naming the message that is wrong."""
    if isinstance(messages, str | Mapping) or not messages:
        raise ChatTemplateError("messages: must be a list with at least one {'role': ..., 'content': ...}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatTemplateError(f"messages[{i}]: must be a mapping with 'role' and 'content', got {message!r}")
        if not isinstance(message.get("role"), str):
            raise ChatTemplateError(f"messages[{i}].role: must be a string, got {message.get('role')!r}")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def render(source: str, messages: Sequence[Message], **variables: Any) -> str:
    """The text of a conversation.

    `variables` are what templates read beside `messages`: add_generation_prompt, bos_token, eos_token, tools, ...
    Raises ChatTemplateError when the template is broken or refuses the messages (roles that do not alternate, ...).
    """
    plain = check_messages(messages)
    try:
        return _compile(source).render({"tools": None, "documents": None, **variables, "messages": plain})
    except jinja2.TemplateError as error:
        raise ChatTemplateError(f"chat template: {error.message or type(error).__name__}") from None
    except (TypeError, ValueError, KeyError, IndexError, ArithmeticError) as error:
        raise ChatTemplateError(f"chat template: {type(error).__name__}: {error}") from error
