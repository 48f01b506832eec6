"""What answers look like, for the OpenAPI document. Tests hold the answers to it; nothing is checked while serving."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from bmojo_edge.server.session_folder import ID

Reason = Literal["stop", "length"]


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Exact):
    """`param` is the field that is wrong, where one is."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Exact):
    """Every answer that is none."""

    error: ErrorDetail


class PromptTokensDetails(_Exact):
    """`cached_tokens` of the prompt were not read again."""

    cached_tokens: int


class Usage(_Exact):
    """Tokens read and said."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenLogprob(_Exact):
    """`bytes` is null where the token is part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """A token of the answer."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Exact):
    """One entry for each token."""

    content: list[ChosenLogprob]
    refusal: None


class TextLogprobs(_Exact):
    """One entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class Message(_Exact):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatChoice(_Exact):
    """The one answer."""

    index: int
    finish_reason: Reason
    logprobs: ChatLogprobs | None
    message: Message


class TextChoice(_Exact):
    """The one answer."""

    index: int
    finish_reason: Reason
    logprobs: TextLogprobs | None
    text: str


class _Completion(_Exact):
    id: str
    created: int
    model: str
    usage: Usage


class ChatCompletion(_Completion):
    """An answer to messages."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(_Completion):
    """An answer to a text."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class Model(_Exact):
    """The model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(_Exact):
    """All there are: one."""

    object: Literal["list"]
    data: list[Model]


class Health(_Exact):
    """How many answers are where, and how many states are kept."""

    status: Literal["ok", "stopped"]
    waiting: int
    reading: int
    running: int
    kept: int


class SessionObject(_Exact):
    """A conversation that is kept. `position` counts the tokens read and said, `bytes` those of its state."""

    object: Literal["session"]
    id: str = Field(pattern=ID)
    title: str
    created: int
    updated: int
    turns: int
    position: int
    bytes: int


class SessionList(_Exact):
    """All of them, the one used last first."""

    object: Literal["list"]
    data: list[SessionObject]


class SessionWithMessages(SessionObject):
    """With what was said."""

    messages: list[Message]


class KeptToken(_Exact):
    """A token that is kept verbatim; `innovation` is null for a sink."""

    position: int
    age: int
    id: int
    text: str
    innovation: float | None


class LayerMemory(_Exact):
    """The memories of one layer; `attention` are shares by the memories' names."""

    kind: str
    sinks: list[KeptToken]
    eidetic: list[KeptToken]
    attention: dict[str, float]


class Memory(_Exact):
    """What a session remembers, and how the attention of its last answer (`queries` tokens of it) divided."""

    position: int
    layers: list[LayerMemory]
    attention: dict[str, float]
    queries: int
    unknown: str
    bytes: int


_ERRORS = {
    400: "what is asked is malformed or out of range",
    401: "the key is missing or wrong",
    403: "a page of another origin wants something changed",
    404: "there is no such model or session",
    408: "the time is over",
    409: "the session exists, or is answering",
    413: "the body is too large",
    421: "this server has another name",
    429: "the server is busy or full",
    500: "the model failed",
    503: "the server is shutting down",
}
_EVENT = {  # `data` is a chunk as OpenAI's API has it, {"error": ...}, or [DONE] at the end
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_ALWAYS = (401, 403, 408, 413, 421)


def responses(status: int, model: type[BaseModel] | None, *errors: int, stream: bool = False) -> dict[int | str, Any]:
    """The `responses` of a route: what it gives, the errors of its own, and those the guard may give."""
    given: dict[str, Any] = {"description": (model.__doc__ or "").strip() if model else "Done."}
    if model is not None:
        given["model"] = model
    if stream:
        given["content"] = {"text/event-stream": {"schema": _EVENT}}
    codes = sorted({*_ALWAYS, *errors})
    return {status: given, **{code: {"model": Error, "description": _ERRORS[code]} for code in codes}}


def describe(app: FastAPI, keyed: bool) -> None:
    """Give an app an OpenAPI document without the status that FastAPI would use for malformed requests, 422."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = original()
            for methods in found["paths"].values():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
            for unused in ("HTTPValidationError", "ValidationError"):
                found["components"]["schemas"].pop(unused, None)
            if keyed:
                found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                found["security"] = [{"key": []}]
                found["paths"]["/health"]["get"]["security"] = []
        return app.openapi_schema or {}

    app.openapi = openapi
