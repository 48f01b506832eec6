"""What is answered: the objects of OpenAI's API, built from generated tokens. This module knows no HTTP."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any, Literal

from bmojo_edge.server.scheduler import Job, Said
from bmojo_edge.tokenizer import Tokenizer

Kind = Literal["chat", "text"]


class Answer:
    """One answer, told whole or chunk by chunk. `top`: None where no log-probabilities were asked for."""

    def __init__(self, kind: Kind, model: str, tokenizer: Tokenizer, top: int | None) -> None:
        self._kind, self._tokenizer, self._top = kind, tokenizer, top
        name = "chat.completion" if kind == "chat" else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}",
            "object": name,
            "created": int(time.time()),
            "model": model,
        }
        self._chunk_head = {**self._head, "object": f"{name}.chunk" if kind == "chat" else name}
        self._eos = tokenizer.eos_ids

    def whole(self, said: list[Said], usage: dict[str, Any]) -> dict[str, Any]:
        """The object of a request that does not stream."""
        text = "".join(one.token.text for one in said)
        choice = {"index": 0, "finish_reason": said[-1].token.finish_reason, "logprobs": self._logprobs(said)}
        content = {"message": {"role": "assistant", "content": text}} if self._kind == "chat" else {"text": text}
        return {**self._head, "choices": [choice | content], "usage": usage}

    def opening(self) -> dict[str, Any] | None:
        """The chunk before the first token, where there is one: it names the role."""
        return self._chunk({"role": "assistant", "content": ""}, None, None) if self._kind == "chat" else None

    def chunk(self, said: Said) -> dict[str, Any] | None:
        """The chunk of a token; None where it says nothing yet."""
        logprobs, token = self._logprobs([said]), said.token
        if not token.text and token.finish_reason is None and logprobs is None:
            return None
        content = {"content": token.text} if self._kind == "chat" else token.text
        return self._chunk(content, token.finish_reason, logprobs)

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk after the last token, with the usage."""
        return {**self._chunk_head, "choices": [], "usage": usage}

    def _chunk(self, content: Any, finish_reason: str | None, logprobs: Any) -> dict[str, Any]:
        choice = {"index": 0, "finish_reason": finish_reason, "logprobs": logprobs}
        choice["delta" if self._kind == "chat" else "text"] = content
        return {**self._chunk_head, "choices": [choice]}

    def _logprobs(self, said: list[Said]) -> dict[str, Any] | None:
        """Log-probabilities of the tokens; the one that ends the sequence is not part of the answer."""
        if self._top is None:
            return None
        said = [one for one in said if one.token.id not in self._eos]
        if self._kind == "chat":
            return {
                "content": [
                    self._entry(one.token.id, one.token.logprob)
                    | {"top_logprobs": [self._entry(i, logprob) for i, logprob in one.likeliest]}
                    for one in said
                ],
                "refusal": None,
            }
        return {
            "tokens": [self._text(one.token.id) for one in said],
            "token_logprobs": [one.token.logprob for one in said],
            "top_logprobs": [{self._text(i): logprob for i, logprob in one.likeliest} for one in said],
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text(token_id)
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # else the token is part of a character: its bytes are lost
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    def _text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])


def usage(job: Job, completion_tokens: int) -> dict[str, Any]:
    """Tokens of prompt and answer, and how many of the prompt's a state had taken in already."""
    read = job.past + len(job.prompt)
    return {
        "prompt_tokens": read,
        "completion_tokens": completion_tokens,
        "total_tokens": read + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": job.cached},
    }


def error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API tells it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_json(content: Any) -> bytes:
    """ASCII, so that no string, however odd, fails to be sent."""
    return json.dumps(content, allow_nan=False).encode()
