"""Generating text: a prompt continued token by token, as an iterator (`stream`) or as a string (`generate`).

It works on any model with the face of `engine.LM`. It knows nothing of arrays, templates or conversations.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

from bmojo_edge.chat_template import Message
from bmojo_edge.engine import LM, evaluate
from bmojo_edge.sampling import Sampler, Sampling, check_count
from bmojo_edge.stopping import StopStrings
from bmojo_edge.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]


class PromptError(ValueError):
    """A prompt cannot be turned into token ids of this model; the message says why."""


class Options(TypedDict, total=False):
    """The options of `stream`."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | Iterable[str]


class Token(NamedTuple):
    """One generated token and the text that became certain with it.

    `text` may be empty (half a character, the beginning of a stop string); all texts together are the answer.
    `logprob` is the natural-log probability under the model's own distribution. `finish_reason` is None but for the
    last token: "stop" (an end-of-sequence token or a stop string) or "length" (max_tokens).
    """

    text: str
    id: int
    logprob: float
    finish_reason: str | None


class Continuation:
    """A sequence being continued. At any moment `state` has taken in everything but the ids in `pending`.

    `context` are ids that the state has already taken in and that the repetition penalty should count; `rng` are the
    random numbers to go on from where no seed is given.
    Raises SamplingError or ValueError naming the option that is out of range.
    """

    def __init__(
        self,
        lm: LM,
        state: Any,
        ids: Sequence[int],
        context: Iterable[int] = (),
        rng: np.random.Generator | None = None,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Iterable[str] = (),
    ) -> None:
        check_count("max_tokens", max_tokens)
        sampling = Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        if ids and max(ids) >= lm.config.vocab_size:
            raise PromptError(
                f"prompt: has token {max(ids)}, the model knows {lm.config.vocab_size:,}; wrong tokenizer?"
            )
        self.state = state
        self.pending = list(ids)
        self.ids: list[int] = []  # generated so far, without the end-of-sequence token
        self.text = ""  # shown so far
        self.finish_reason: str | None = None
        self._lm = lm
        self._max_tokens = max_tokens
        self._taken = 0  # tokens chosen, the end-of-sequence token included
        self._sampler = Sampler(sampling, lm.config.vocab_size, [*context, *ids], rng)
        self._stop = StopStrings(stop)
        self._detokenizer = _tokenizer(lm).detokenizer()

    @property
    def cut(self) -> bool:
        """Whether a stop string cut the text: `ids` then say more than `text`."""
        return self._stop.hit

    def tokens(self) -> Iterator[Token]:
        """Generate until an end-of-sequence id, a stop string or `max_tokens`. It may be left at any token."""
        while self.finish_reason is None and self._taken < self._max_tokens:
            yield self.take(self._advance())

    def take(self, logits: np.ndarray) -> Token:
        """The next token, chosen from the logits (v,) that follow all ids so far; it becomes `pending`.

        For callers that move the state themselves, as a batch of continuations does.
        """
        chosen = self._sampler.choose(logits)
        self._taken += 1
        text = ""
        if chosen.id in _tokenizer(self._lm).eos_ids:
            self.finish_reason = "stop"
        else:
            self.ids.append(chosen.id)
            self.pending = [chosen.id]
            text = self._stop.feed(self._detokenizer.feed(chosen.id))
            self.finish_reason = "length" if self._taken == self._max_tokens else None
        if self.finish_reason is not None:
            text += self._stop.feed(self._detokenizer.finish())
            text += self._stop.finish()
        if self._stop.hit:
            self.finish_reason = "stop"
        self.text += text
        return Token(text, chosen.id, chosen.logprob, self.finish_reason)

    def _advance(self) -> np.ndarray:
        """Feed what is pending; the logits (v,) that follow it."""
        ids = np.array(self.pending, dtype=np.int32)
        if ids.size == 1:
            logits, self.state = self._lm.decode_one_token(ids, self.state)
        else:
            prefill = self._lm.prefill
            if not self.ids:  # a prompt: a model with storage looks up what it asks for
                prefill = getattr(self._lm, "prefill_prompt", prefill)
            logits, self.state = prefill(ids[None], self.state)
        self.pending = []  # nothing between this and the line above: Ctrl-C must not find one without the other
        return evaluate(logits, self.state)


def stream(
    lm: LM,
    prompt: Prompt,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Iterable[str] = (),
) -> Iterator[Token]:
    """Continue a prompt token by token.

    `prompt` is a text (encoded with the special tokens the model expects around it), a list of ids, or a list of chat
    messages (rendered by the model's template). `temperature` 0 is greedy; then follow, in transformers' order,
    `repetition_penalty` (over prompt and answer), temperature, `top_k` (0 off), `top_p` (1 off), `min_p` (0 off).
    The same `seed` gives the same tokens for the same logits. Generation ends at an end-of-sequence id, before the
    first of the `stop` strings, or after `max_tokens`.

    Raises PromptError, ChatTemplateError or SamplingError at the call, before anything is computed.
    """
    ids = prompt_ids(lm, prompt)
    run = Continuation(
        lm,
        lm.init_state(),
        ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    return run.tokens()


def generate(
    lm: LM,
    prompt: Prompt,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Iterable[str] = (),
) -> str:
    """The continuation of a prompt as one string; prompt, options and errors are those of `stream`."""
    tokens = stream(lm, prompt, max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop)
    return "".join(token.text for token in tokens)


def prompt_ids(lm: LM, prompt: Prompt) -> list[int]:
    """The ids of a prompt, never empty: an empty prompt is the model's beginning-of-sequence token."""
    if isinstance(prompt, str):
        ids = _tokenizer(lm).encode(prompt)
    elif isinstance(prompt, Mapping):
        raise PromptError("prompt: must be a text, a list of token ids or a list of messages, got one mapping")
    elif len(prompt) and isinstance(prompt[0], Mapping):
        ids = _tokenizer(lm).chat(prompt)  # pyright: ignore[reportArgumentType]
    else:
        ids = _checked_ids(prompt, lm.config.vocab_size)
    if ids:
        return ids
    tokenizer = _tokenizer(lm)
    if tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    if tokenizer.eos_ids:  # models without a beginning-of-sequence token are trained with this between documents
        return [min(tokenizer.eos_ids)]
    raise PromptError("prompt: is empty, and this model has no token that begins a text; give at least one token")


def _checked_ids(prompt: Sequence[Any], vocab_size: int) -> list[int]:
    ids: list[int] = []
    for i, value in enumerate(prompt):
        try:
            token_id = operator.index(value)
        except TypeError:
            raise PromptError(f"prompt[{i}]: must be a token id (an integer) or a message, got {value!r}") from None
        if not 0 <= token_id < vocab_size:
            raise PromptError(f"prompt[{i}]: {token_id} is not an id of this model's {vocab_size:,} tokens")
        ids.append(token_id)
    return ids


def _tokenizer(lm: LM) -> Tokenizer:
    if lm.tokenizer is None:
        raise PromptError("this model folder has no tokenizer; put tokenizer.json or tokenizer.model into it")
    return lm.tokenizer
