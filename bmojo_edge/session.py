"""A conversation with a model, held in one state: every turn feeds only what is new.

A turn's new ids come from rendering the whole conversation with the model's template and leaving off what the state
has taken in. Sampled tokens stay as sampled; the tokens that end an answer come with the next turn, from the template.
Where a template rewrites the past (drops earlier reasoning, moves the system prompt), the session goes back to the
latest earlier state whose text still stands and feeds the rest again: usually one turn.
States are values, so going back is keeping a reference. This module knows nothing of arrays or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Self, Unpack

from bmojo_edge.engine import LM, state_nbytes
from bmojo_edge.generate import Continuation, Options, PromptError
from bmojo_edge.tokenizer import Tokenizer


@dataclass(slots=True)
class Turn:
    """One exchange. `prompt_ids` and `answer_ids` follow what had been taken in before turn `base`."""

    user: str
    base: int  # this turn's own index, or an earlier one where the template rewrote the past
    prompt_text: str
    prompt_ids: list[int]
    answer: str = ""
    answer_ids: list[int] = field(default_factory=list)
    said: str = ""  # the answer as it continues the prompt: a word's own space before it included
    finish_reason: str | None = None  # None: interrupted
    before: tuple[Any, list[int]] | None = None  # state and pending ids before the turn, while kept


class Session:
    """A conversation in constant memory (where the model's state is).

    `system` is the system message. `snapshot_bytes` bounds the states kept for `rewind`; going back further feeds the
    remaining turns again. Raises PromptError without a tokenizer, ChatTemplateError without a chat template.
    """

    def __init__(self, lm: LM, system: str | None = None, snapshot_bytes: int = 2**28) -> None:
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
        state, pending = self._before(base)
        suffix = rendered[len(past) :]
        ids = self._tokenizer.encode_continuation(suffix) if past else self._tokenizer.encode(suffix, False)
        context = self._ids(base)[-self._lm.config.window :] if options.get("repetition_penalty", 1.0) != 1.0 else ()
        run = Continuation(self._lm, state, [*pending, *ids], context, **options)
        self._turns.append(Turn(text, base, suffix, ids, before=(self._state, self._pending)))
        self._run = run
        self._forget_old_snapshots()
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
            self._state, self._pending = self._before(k)
            del self._turns[k:]
        return self

    # --- how

    def _answer(self, run: Continuation) -> Iterator[str]:
        try:
            for token in run.tokens():
                if token.text:
                    yield token.text
                if self._run is not run:  # another call closed this turn
                    return
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
            if run.ids[n:] == run.pending:
                self._pending = rest
            else:
                self._state, self._pending = self._before(turn.base)
                self._pending += [*turn.prompt_ids, *turn.answer_ids]
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
        """The latest turn before which what was taken in is how `rendered` begins, and that beginning."""
        for k in range(len(self._turns), 0, -1):
            if k < len(self._turns) and self._turns[k].before is None:
                break
            *earlier, last = self._path(k)
            past = "".join(turn.prompt_text + turn.said for turn in earlier) + last.prompt_text
            for said in (last.said, last.answer):  # a template may or may not put a space before an answer
                if rendered.startswith(past + said):
                    last.said = said
                    return k, past + said
        return 0, ""

    def _path(self, k: int) -> list[Turn]:
        """The turns whose prompt and answer make up what was taken in before turn `k`."""
        path: list[Turn] = []
        while k:
            path.append(self._turns[k - 1])
            k = path[-1].base
        return path[::-1]

    def _ids(self, k: int) -> list[int]:
        return [i for turn in self._path(k) for i in (*turn.prompt_ids, *turn.answer_ids)]

    def _before(self, k: int) -> tuple[Any, list[int]]:
        """State and pending ids before turn `k`."""
        if k == len(self._turns):
            return self._state, [*self._pending]
        snapshot = self._turns[k].before
        if snapshot is not None:
            return snapshot[0], [*snapshot[1]]
        return self._lm.init_state(), self._ids(k)

    def _forget_old_snapshots(self) -> None:
        held = 0
        for turn in reversed(self._turns):
            if turn.before is None:
                break
            held += state_nbytes(turn.before[0])
            if held > self._snapshot_bytes and turn is not self._turns[-1]:
                turn.before = None
