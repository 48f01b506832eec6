"""A conversation with a model, held in one state: every turn feeds only what is new.

A turn's new ids come from rendering the whole conversation with the model's template and leaving off what the state
has taken in. Sampled tokens stay as sampled; the tokens that end an answer come with the next turn, from the template.
Where a template rewrites the past (drops earlier reasoning, moves the system prompt), the session goes back to the
latest kept state whose text still stands and feeds the rest again: usually the last answer, or the last exchange.
States are values, so going back is keeping a reference. This module knows nothing of arrays or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Self, Unpack

from bmojo_edge.config import Config
from bmojo_edge.engine import LM, state_nbytes
from bmojo_edge.generate import Continuation, Options, PromptError
from bmojo_edge.tokenizer import Tokenizer


@dataclass(slots=True)
class Turn:
    """One exchange. `prompt_ids` and `answer_ids` follow what had been taken in at mark `base`.

    Mark 2k is the moment before turn k, mark 2k + 1 the one between its prompt and its answer.
    """

    user: str
    base: int  # twice this turn's own index, or less where the template rewrote the past
    prompt_text: str
    prompt_ids: list[int]
    answer: str = ""
    answer_ids: list[int] = field(default_factory=list)
    said: str = ""  # the answer as it continues the prompt: a word's own space before it included
    finish_reason: str | None = None  # None: interrupted
    before: tuple[Any, list[int]] | None = None  # state and pending ids at mark 2k, while kept
    prompted: Any = None  # state at mark 2k + 1, of the last turn only


class Session:
    """A conversation, in constant memory where the model's state is constant.

    `system` is the system message. `snapshot_bytes` bounds the states kept so that `rewind` computes nothing, beside
    those of the last turn; going back further feeds the remaining turns again when the conversation goes on.
    Raises PromptError without a tokenizer, ChatTemplateError without a chat template.
    """

    def __init__(self, lm: LM, system: str | None = None, snapshot_bytes: int = 2**29) -> None:
        if lm.tokenizer is None:
            raise PromptError("this model folder has no tokenizer; put tokenizer.json or tokenizer.model into it")
        self._lm = lm
        self._tokenizer: Tokenizer = lm.tokenizer
        self._system = system
        self._snapshot_bytes = snapshot_bytes
        self._started = datetime.now()
        self._turns: list[Turn] = []
        self._state = lm.init_state()
        self._pending: list[int] = []  # ids that belong to the conversation and are fed with the next turn
        self._run: Continuation | None = None  # the turn being answered
        self._render("")  # a missing or broken template shows now

    # --- what it holds

    @property
    def config(self) -> Config:
        """The model's configuration."""
        return self._lm.config

    @property
    def position(self) -> int:
        """Tokens the conversation has so far."""
        state, pending = (self._run.state, self._run.pending) if self._run else (self._state, self._pending)
        return int(state.position[0]) + len(pending)

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return state_nbytes(self._run.state if self._run else self._state)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, as chat messages."""
        return self._messages(self.turns)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The exchanges so far, oldest first."""
        return tuple(self.fork()._turns)

    # --- what it does

    def say(self, text: str, **options: Unpack[Options]) -> Iterator[str]:
        """Say something and stream the answer; the options are those of `stream`.

        Leaving the iterator early (break, close, Ctrl-C) keeps the answer so far and closes the turn. The repetition
        penalty counts the last `window` tokens of the conversation. Raises at the call, leaving the session as it was,
        where an option is out of range or the template refuses the text.
        """
        if not isinstance(text, str):
            raise PromptError(f"text: must be a string, got {type(text).__name__}")
        self._close()
        rendered = self._render(text)
        base, past = self._standing(rendered)
        state, pending = self._at(base)
        suffix = rendered[len(past) :]
        ids = self._tokenizer.encode_continuation(suffix) if past else self._tokenizer.encode(suffix, False)
        context = self._ids(base)[-self._lm.config.window :] if options.get("repetition_penalty", 1.0) != 1.0 else ()
        run = Continuation(self._lm, state, [*pending, *ids], context, **options)
        self._forget_old_states()
        self._turns.append(Turn(text, base, suffix, ids, before=(self._state, self._pending)))
        self._run = run
        return self._answer(run)

    def fork(self) -> Session:
        """A second conversation with the same past; neither ever affects the other. Arrays are shared until written.

        In the fork of a session that is answering, the answer ends where it is.
        """
        twin = copy(self)
        twin._turns = [replace(turn) for turn in self._turns]
        twin._close()
        return twin

    def rewind(self, turns: int = 1) -> Self:
        """Take back the last `turns` exchanges, as if never said. Raises ValueError if there are fewer."""
        self._close()
        if isinstance(turns, bool) or not isinstance(turns, int) or not 0 <= turns <= len(self._turns):
            raise ValueError(f"turns: must be between 0 and the {len(self._turns)} there are, got {turns!r}")
        if turns:
            k = len(self._turns) - turns
            self._state, self._pending = self._at(2 * k)
            del self._turns[k:]
        return self

    # --- how

    def _answer(self, run: Continuation) -> Iterator[str]:
        try:
            tokens = run.tokens()
            while self._run is run and (token := next(tokens, None)):  # another call may have closed this turn
                if self._turns[-1].prompted is None:
                    self._turns[-1].prompted = run.state
                if token.text:
                    yield token.text
        finally:
            if self._run is run:
                self._close()

    def _close(self) -> None:
        """End the open turn, if any, with the answer as it is."""
        run, self._run = self._run, None
        if run is None:
            return
        turn, decode = self._turns[-1], self._tokenizer.decode
        self._state, self._pending = run.state, [*run.pending]
        turn.answer, turn.answer_ids, turn.finish_reason = decode(run.ids), [*run.ids], run.finish_reason
        if run.cut:
            # The state may hold part of a stop string: keep the tokens before it, feed the rest anew.
            n = next(n for n in range(len(run.ids), -1, -1) if run.text.startswith(decode(run.ids[:n])))
            rest = self._tokenizer.encode_continuation(run.text[len(decode(run.ids[:n])) :])
            turn.answer, turn.answer_ids = run.text, [*run.ids[:n], *rest]
            self._state, self._pending = turn.prompted, [*turn.answer_ids]
        last = turn.prompt_ids[-1:]
        turn.said = decode([*last, *turn.answer_ids])[len(decode(last)) :]

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        for turn in turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def _render(self, text: str) -> str:
        """The whole conversation with a new message; templates that print the date keep the day it began."""
        messages = [*self._messages(self._turns), {"role": "user", "content": text}]
        return self._tokenizer.render_chat(messages, strftime_now=self._started.strftime)

    def _standing(self, rendered: str) -> tuple[int, str]:
        """The latest mark at which what had been taken in is how `rendered` begins, and that beginning."""
        for mark in range(2 * len(self._turns), 0, -1):
            if not self._kept(mark):
                continue
            path = self._path(mark)
            last, answered = path[-1]
            past = "".join(turn.prompt_text + turn.said * said for turn, said in path[:-1]) + last.prompt_text
            for said in (last.said, last.answer) if answered else ("",):  # with and without a space before the answer
                if rendered.startswith(past + said):
                    last.said = said if answered else last.said
                    return mark, past + said
        return 0, ""

    def _path(self, mark: int) -> list[tuple[Turn, bool]]:
        """The turns that make up what had been taken in at a mark, and whether their answers belong to it."""
        path: list[tuple[Turn, bool]] = []
        while mark:
            path.append((self._turns[(mark - 1) // 2], mark % 2 == 0))
            mark = path[-1][0].base
        return path[::-1]

    def _ids(self, mark: int) -> list[int]:
        return [i for turn, said in self._path(mark) for i in turn.prompt_ids + turn.answer_ids * said]

    def _kept(self, mark: int) -> bool:
        k, answering = divmod(mark, 2)
        return k == len(self._turns) or (self._turns[k].prompted if answering else self._turns[k].before) is not None

    def _at(self, mark: int) -> tuple[Any, list[int]]:
        """State and pending ids at a mark."""
        k, answering = divmod(mark, 2)
        if k == len(self._turns):
            return self._state, [*self._pending]
        if not self._kept(mark):
            return self._lm.init_state(), self._ids(mark)
        if answering:
            return self._turns[k].prompted, []
        state, pending = self._turns[k].before or (None, [])
        return state, [*pending]

    def _forget_old_states(self) -> None:
        held = 0
        for turn in reversed(self._turns):
            turn.prompted = None
            held += state_nbytes(turn.before[0]) if turn.before else 0
            if held > self._snapshot_bytes:
                turn.before = None
