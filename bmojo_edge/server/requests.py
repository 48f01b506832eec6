"""What may be asked: the bodies of OpenAI's API as far as they are supported, checked field by field.

A field that would change the answer and is not supported is refused by name, unless it says what is the case anyway;
fields that only label a request are taken and ignored. This module knows no HTTP and no model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from bmojo_edge.generate import Options, Prompt
from bmojo_edge.server.session_folder import ID

MAX_STOPS = 16
MAX_TITLE = 200  # characters


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 3.0 is an integer, as JSON Schema says too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _or(kinds: str) -> WrapValidator:
    """One error, which tells the kinds that a field may be of, in place of one for each."""

    def checked(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("kinds", "must be {kinds}", {"kinds": kinds}) from None

    return WrapValidator(checked)


Whole = Annotated[int, BeforeValidator(_whole)]
One = Annotated[Literal[1], BeforeValidator(_whole)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None,
    _or(f"a text, or a list of at most {MAX_STOPS}, none of them empty"),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """`include_usage`: one more chunk at the end, with the usage."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextPart(_Strict):
    """A piece of a message; only text."""

    type: Literal["text"]
    text: str


class TextFormat(_Strict):
    """How answers are written; only as text."""

    type: Literal["text"]


class ChatMessage(_Strict):
    """One message of a conversation; an answer may come back with all fields that clients know of it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart], _or('a text, or a list of {"type": "text", "text": ...}; no other type')]
    name: str | None = None
    refusal: None = None
    annotations: Nothing = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None

    def plain(self) -> dict[str, str]:
        """As chat templates read it; templates know no "developer"."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _Request(_Strict):
    """What both kinds have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: Whole | None = Field(default=None, ge=0)  # this and the two below are ours, as mlx-lm and vLLM have them
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    seed: Whole | None = None
    stop: Stop = None
    n: One | None = None
    frequency_penalty: float | None = Field(default=None, ge=0.0, le=0.0)  # what is not supported must be off
    presence_penalty: float | None = Field(default=None, ge=0.0, le=0.0)
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    def options(self, max_tokens: int) -> Options:
        """As `generate.stream` takes them; temperature and top_p are 1 where none is given, as OpenAI's API has it."""
        return {
            "max_tokens": max_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": self.top_k or 0,
            "min_p": self.min_p or 0.0,
            "repetition_penalty": 1.0 if self.repetition_penalty is None else self.repetition_penalty,
            "seed": None if self.seed is None else self.seed % 2**64,
            "stop": () if self.stop is None else self.stop,
        }


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Whole | None = Field(default=None, ge=1)
    max_completion_tokens: Whole | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(default=None, ge=0, le=20)
    response_format: TextFormat | None = None
    tools: None = None
    tool_choice: Literal["none", "auto"] | None = None  # without tools these change nothing
    parallel_tool_calls: bool | None = None
    functions: None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    session_id: str | None = Field(default=None, pattern=ID)  # ours: messages are only what is new in this session

    @property
    def text(self) -> Prompt:
        """What is to be continued: the messages."""
        return [message.plain() for message in self.messages]

    @property
    def turn(self) -> tuple[str | None, str]:
        """What is new in a session: a system message, if any, and the user's. Raises ValueError where it is more."""
        *before, last = (message.plain() for message in self.messages)
        if last["role"] != "user" or [message["role"] for message in before] not in ([], ["system"]):
            raise ValueError(
                "messages: with session_id, only what is new: one message of the user's, and before the first one a "
                "system message if wanted"
            )
        return before[0]["content"] if before else None, last["content"]

    @property
    def limit(self) -> int | None:
        """The most tokens asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens to tell; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """The body of /v1/completions."""

    prompt: Annotated[
        str | list[Annotated[Whole, Field(ge=0)]] | Annotated[list[str], Field(min_length=1, max_length=1)],
        _or("one text, or the ids of one"),
    ]
    max_tokens: Whole | None = Field(default=16, ge=1)
    logprobs: Whole | None = Field(default=None, ge=0, le=5)
    echo: Literal[False] | None = None
    best_of: One | None = None
    suffix: None = None

    @property
    def text(self) -> Prompt:
        """What is to be continued: a text, or ids."""
        prompt: Any = self.prompt
        return prompt[0] if isinstance(prompt, list) and prompt and isinstance(prompt[0], str) else prompt

    @property
    def limit(self) -> int | None:
        """The most tokens asked for."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens to tell; None: no log-probabilities at all."""
        return self.logprobs


class NewSession(_Strict):
    """The body of POST /v1/sessions."""

    id: str | None = Field(default=None, pattern=ID)
    title: str | None = Field(default=None, max_length=MAX_TITLE)


class SessionTitle(_Strict):
    """The body of PATCH /v1/sessions/{id}."""

    title: str = Field(max_length=MAX_TITLE)


class Fork(_Strict):
    """The body of POST /v1/sessions/{id}/fork: how many turns the new session has; left out, all."""

    turns: Whole | None = Field(default=None, ge=0)


class Rewind(_Strict):
    """The body of POST /v1/sessions/{id}/rewind: how many turns are taken back."""

    turns: Whole = Field(ge=1)
