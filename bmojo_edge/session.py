"""A conversation with a model, held in one state: every turn feeds only what is new.

A turn's new ids come from rendering the conversation's last turns with the model's template and leaving off what the
state has taken in. Sampled tokens stay as sampled; the tokens that end an answer come with the next turn, from the
template. Where a template rewrites the past (drops earlier reasoning, moves the system prompt), the session goes back
to the latest kept moment whose text still stands and feeds the rest again. Moments are values, so going back is keeping
a reference. This module knows nothing of arrays or of how a file is laid out (docs/sessions.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np

from bmojo_edge import session_file
from bmojo_edge.config import Config
from bmojo_edge.engine import LM, evaluate, state_nbytes
from bmojo_edge.generate import Continuation, Options, PromptError
from bmojo_edge.moment import Moment, branched, first_moment
from bmojo_edge.sampling import check_count
from bmojo_edge.session_file import SavedSession, SessionError
from bmojo_edge.steps import Steps
from bmojo_edge.tokenizer import Tokenizer
from bmojo_edge.turn import SAVED_TEXT, Answering, Point, Turn, turn_as_saved

__all__ = ["Answering", "Point", "Session", "SessionError", "Turn"]

FRAME = 8  # turns that are rendered to find what is new, and more only where the template rewrites an older one
KEPT_TURNS = 64  # turns whose text is kept, and more only while their states are or the template needs them
SAVED_TURNS, SAVED_BYTES = 8, 2**27  # snapshots in a file, the last one always
BLOCK = 128  # tokens that are read at a time where something else may be done in between


class Session:
    """A conversation, in constant memory where the model's state is constant.

    `system` is the system message. `snapshot_bytes` bounds the states kept for `rewind`, beside those of the last turn;
    the oldest go first. `seed` makes unseeded sampling repeatable. `blank` is a fresh state of the model that many
    sessions can begin from.
    Raises PromptError without a tokenizer, ChatTemplateError without a chat template, SamplingError for a seed below 0.
    """

    def __init__(
        self, lm: LM, system: str | None = None, snapshot_bytes: int = 2**29, seed: int | None = None, blank: Any = None
    ) -> None:
        if lm.tokenizer is None:
            raise PromptError("this model folder has no tokenizer; put tokenizer.json or tokenizer.model into it")
        if seed is not None:
            check_count("seed", seed)
        self._lm = lm
        self._tokenizer: Tokenizer = lm.tokenizer
        self._system = system
        self._snapshot_bytes = snapshot_bytes
        self._started = datetime.now()
        self._blank = blank
        self._point = Point(first_moment(lm.init_state() if blank is None else blank, seed))
        self._start: Moment | None = self._point.now  # before the first turn, while no turn is forgotten
        self._read_ahead = ""  # how every rendering begins that goes on from the start
        self._turns: list[Turn] = []
        self._forgotten = 0  # turns before these
        self._forks = 0
        self._answering: Answering | None = None
        self._render((), "")  # a missing or broken template shows now

    # --- what it holds

    @property
    def config(self) -> Config:
        """The model's configuration."""
        return self._lm.config

    @property
    def lm(self) -> LM:
        """The model."""
        return self._lm

    @property
    def system(self) -> str | None:
        """The system message."""
        return self._system

    @property
    def position(self) -> int:
        """Tokens the conversation has so far."""
        if self._answering is None:
            return self._point.now.position
        run = self._answering.run
        return int(run.state.position[0]) + len(run.pending)

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return state_nbytes(self._answering.run.state if self._answering else self._point.now.state)

    @property
    def held_bytes(self) -> int:
        """Bytes of all states it holds, the present one and those kept for going back; a shared `blank` is not one."""
        points = [self._point, *(turn.before for turn in self._turns if turn.before)]
        moments = [moment for moment in (*(m for point in points for m in point), self._start) if moment is not None]
        states = {id(moment.state): moment.nbytes for moment in moments if moment.state is not self._blank}
        return sum(states.values())

    @property
    def rolling_hash(self) -> str:
        """16 hexadecimal digits that tell this sequence of token ids from others."""
        return f"{self._settled()._point.now.rolling_hash:016x}"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages, as far back as its turns are kept."""
        return self._messages(self.turns)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The exchanges that are kept, oldest first."""
        return tuple(self._settled()._turns)

    @property
    def moment(self) -> Moment:
        """State and ids as they are now."""
        return self._settled()._point.now

    # --- what it does

    def say(self, text: str, **options: Unpack[Options]) -> Iterator[str]:
        """Say something and stream the answer; the options are those of `stream`.

        Leaving the iterator early (break, close, Ctrl-C) keeps the answer so far and closes the turn. The repetition
        penalty counts the last `window` tokens of the conversation. Raises at the call, leaving the session as it was,
        where an option is out of range or the template refuses the text.
        """
        return self._answer(self.ask(text, **options))

    def ask(self, text: str, **options: Unpack[Options]) -> Answering:
        """Say something whose answer the caller computes, as a batch of continuations is, and then `close` it.

        The caller moves `run`, and sets `asked` to the state between question and answer. Raises as `say` does.
        """
        if not isinstance(text, str):
            raise PromptError(f"text: must be a string, got {type(text).__name__}")
        self.close()
        mark, base, ids = self._plan(text)
        window = self._lm.config.window
        context = base.recent[-window:] if options.get("repetition_penalty", 1.0) != 1.0 else ()
        rng = self._point.now.generator()
        run = Continuation(self._lm, base.state, [*base.pending, *ids], context, rng, **options)
        self._forget(mark)
        asked = self._point.asked if mark == 2 * len(self._turns) - 1 else None
        self._turns.append(Turn(text, before=Point(self._point.now, asked)))
        self._answering = Answering(run, base, ids, rng)
        return self._answering

    def read(self, text: str = "") -> Self:
        """Take in the system message, and `text` after it, before the first question; forks share the work.

        The text comes where the first question will, as if that began with it. It is not kept, only remembered.
        Raises SessionError after the first question, or where the template moves what stands before it.
        """
        self.close()
        if self._turns or self._forgotten:
            raise SessionError("read: comes before the first question; say() what is to be read later")
        now, ahead = self._point.now, self._ahead()
        new = ahead[len(self._read_ahead) :] + text
        ids = self._encoded(new, now)
        if ids:
            logits, state = self._lm.prefill(np.array([ids], np.int32), now.state)
            evaluate(logits, state)
            self._read_ahead = ahead
            self._point = Point(now.after(ids, state, (), self._lm.config))
            self._start = self._point.now
        return self

    def retell(self, exchanges: Sequence[tuple[str, str]]) -> Steps[None]:
        """Take in questions and their answers as if they had been said here; yields after each block of tokens.

        The answers are cut into tokens anew. Raises SessionError after the first question.
        """
        if self._turns or self._forgotten:
            raise SessionError("retell: comes before the first question")
        turns, n = [Turn(user, answer, said=answer) for user, answer in exchanges], len(exchanges)
        point, so_far, start = self._point, self._read_ahead, self._point.now
        for k in range(max(0, n - 2), n):  # so that the state before the last exchange is there to go back to
            turn, asked = turns[k], self._render(turns[:k], turns[k].user)
            goes_on = asked.startswith(so_far)  # else the template has rewritten the answer before
            base, read = (point.now, so_far) if goes_on else (start, self._read_ahead)
            question, _ = yield from self._reading(asked[len(read) :], base)
            now, answer_ids = yield from self._reading(turn.answer, question)
            turns[k] = replace(turn, answer_ids=answer_ids, before=point if k == n - 1 else None)
            point, so_far = Point(now, question), asked + turn.answer
        self._point, self._turns = point, turns
        if n:
            self._drop_asked()

    def regenerate(self, **options: Unpack[Options]) -> Iterator[str]:
        """Answer the last question anew; unseeded, the draws are new ones."""
        self.close()
        if not self._turns:
            raise SessionError("regenerate: there is no answer yet")
        if not self._turns[-1].user_whole:
            raise SessionError(f"regenerate: the file kept only {SAVED_TEXT:,} characters of the question; edit() it")
        return self._instead(1, self._turns[-1].user, self._point.now.draws, options)

    def edit(self, text: str, turns: int = 1, **options: Unpack[Options]) -> Iterator[str]:
        """Say `text` in place of the question `turns` exchanges ago; all that followed that question is taken back."""
        self.close()
        if turns == 0:
            raise SessionError("turns: must be at least 1, the last question")
        return self._instead(turns, text, None, options)

    def fork(self) -> Session:
        """A second conversation with the same past; neither ever affects the other. Arrays are shared until written.

        In the fork of a session that is answering, the answer ends where it is. Unseeded, a fork draws other random
        numbers than the session it comes from, and than other forks of it.
        """
        twin, self._forks = self._settled(), self._forks + 1
        now = twin._point.now
        twin._point = twin._point._replace(now=now._replace(draws=branched(now.draws, self._forks)))
        twin._forks = 0
        return twin

    def rewind(self, turns: int = 1) -> Self:
        """Take back the last `turns` exchanges, as if never said, random numbers and all.

        Raises ValueError if there are fewer, SessionError if their snapshots were dropped (`snapshot_bytes`).
        """
        self.close()
        n = len(self._turns)
        if isinstance(turns, bool) or not isinstance(turns, int) or not 0 <= turns <= n + self._forgotten:
            raise ValueError(f"turns: must be between 0 and the {n + self._forgotten} there are, got {turns!r}")
        if turns:
            point = self._before(n - turns)
            if point is None:
                back = next(i for i in range(turns - 1, -1, -1) if i == 0 or self._before(n - i))
                raise SessionError(
                    f"turns: only the last {back} of the {n + self._forgotten} exchanges can be taken back; snapshots "
                    f"of earlier ones are not kept (snapshot_bytes is {self._snapshot_bytes:,})"
                )
            del self._turns[n - turns :]
            self._point = point
        return self

    def last_exchange(self) -> tuple[Any, list[int], list[int]]:
        """What the last answer came from: a state, the ids that were fed to it, and the answer's ids.

        Raises SessionError where there is no answer, or a file did not keep what it takes.
        """
        twin = self._settled()
        if not twin._turns:
            raise SessionError("there is no answer yet")
        turn = twin._turns[-1]
        if not turn.user_whole or (turn.answer and not turn.answer_ids):
            raise SessionError("the last exchange is longer than what a session file keeps whole")
        _, base, ids = twin.rewind()._plan(turn.user)
        return base.state, [*base.pending, *ids], turn.answer_ids

    # --- on the disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to one file, whole or not at all, replacing a former one; its size does not grow.

        It holds the state, the last turns (of long texts beginning and end) and the snapshots of at most SAVED_TURNS
        of them, fewer where they exceed SAVED_BYTES, but always that of the last. The state of a model with full
        attention grows, and so does its file.
        """
        session_file.write(Path(path), self.packed())

    def packed(self) -> SavedSession:
        """What `save` writes, copied: it can be written later, and in another thread."""
        content, moments = self._settled()._as_saved()
        return session_file.packed(self._lm, content, moments)

    @classmethod
    def open(cls, path: str | os.PathLike[str], lm: LM, snapshot_bytes: int = 2**29) -> Self:
        """The session in a file, as it was; only the snapshots that were saved can be gone back to.

        Raises SessionError naming file and field where it is damaged or of another model, or has a store and `lm` none.
        """
        content, moments = session_file.opened(Path(path), lm)
        session = cls(lm, content["system"], snapshot_bytes)
        session._started = datetime.fromisoformat(content["started"])
        session._read_ahead, session._forgotten = content["read_ahead"], content["forgotten"]
        session._forks = content.get("forks", 0)  # older files have none

        def moment(i: int | None) -> Moment | None:
            return None if i is None else moments[i]

        def point(entry: Sequence[int | None] | None) -> Point | None:
            return None if entry is None else Point(moments[entry[0] or 0], moment(entry[1]))

        session._point = Point(moments[0], moment(content["asked"]))
        session._start = moment(content["start"])
        session._turns = [Turn(**turn, before=point(entry)) for turn, entry in content["turns"]]
        return session

    def _as_saved(self) -> tuple[dict[str, Any], list[Moment]]:
        """What `open` needs, with moments by their number in the list."""
        n = len(self._turns)
        mark = self._standing("?")[0] if n else 0
        moments: list[Moment] = []

        def number(moment: Moment | None) -> int | None:
            if moment is not None and not any(m is moment for m in moments):
                moments.append(moment)
            return next((i for i, m in enumerate(moments) if m is moment), None)

        number(self._point.now)
        content: dict[str, Any] = {
            "system": self._system,
            "started": self._started.isoformat(),
            "read_ahead": self._read_ahead,
            "forks": self._forks,
            "asked": number(self._point.asked) if mark == 2 * n - 1 else None,
            "start": number(self._start) if mark == 0 else None,
        }
        points, room = {}, SAVED_BYTES - sum(moment.nbytes for moment in moments)
        for k in range(n - 1, max(-1, n - 1 - SAVED_TURNS), -1):
            point = self._before(k)
            room -= point.nbytes if point else 0
            if point is None or (room < 0 and k < n - 1):
                break
            points[k] = [number(point.now), number(point.asked)]
        if not self._forgotten and n and content["start"] is None and 0 in points:
            content["start"] = points[0][0]
        # What stands before the mark is only rendered for its form; an answer may also be needed after a rewind.
        first = min(max(0, n - KEPT_TURNS), max(0, (mark + 1) // 2 - 1))
        needed = n if mark == 2 * n else min(points, default=n) - 1
        content["forgotten"] = self._forgotten + first
        content["turns"] = [
            (turn_as_saved(turn, 2 * k + 1 <= mark, 2 * k + 2 <= mark and k < needed, k == n - 1), points.get(k))
            for k, turn in enumerate(self._turns)
            if k >= first
        ]
        return content, moments

    # --- how

    def _answer(self, answering: Answering) -> Iterator[str]:
        run = answering.run
        try:
            tokens = run.tokens()
            while self._answering is answering and (token := next(tokens, None)):  # another call may have closed it
                if answering.asked is None:
                    answering.asked = run.state, ()
                if token.text:
                    yield token.text
        finally:
            if self._answering is answering:
                self.close()

    def close(self) -> None:
        """End the open turn, if any, with the answer as it is."""
        answering, self._answering = self._answering, None
        if answering is None:
            return
        run, base, ids, config = answering.run, answering.base, answering.ids, self._lm.config
        turn, decode = self._turns[-1], self._tokenizer.decode
        state, pending = run.state, run.pending
        turn.answer, turn.answer_ids, turn.finish_reason = decode(run.ids), [*run.ids], run.finish_reason
        if run.cut:
            # The state may hold part of a stop string: keep the tokens before it, feed the rest anew.
            n = next(n for n in range(len(run.ids), -1, -1) if run.text.startswith(decode(run.ids[:n])))
            rest = self._tokenizer.encode_continuation(run.text[len(decode(run.ids[:n])) :])
            turn.answer, turn.answer_ids = run.text, [*run.ids[:n], *rest]
            assert answering.asked is not None
            state, pending = answering.asked[0], [*answering.asked[1], *turn.answer_ids]
        now = base.after([*ids, *turn.answer_ids], state, pending, config)
        asked = None if answering.asked is None else base.after(ids, *answering.asked, config)
        self._point = Point(now._replace(draws=answering.rng.bit_generator.state), asked)
        last = ids[-1:]
        turn.said = decode([*last, *turn.answer_ids])[len(decode(last)) :]
        self._drop_asked()

    def _drop_asked(self) -> None:
        """Keep the state before the last answer only where the template rewrites that answer."""
        try:
            rewritten = self._standing("?")[0] != 2 * len(self._turns)
        except ValueError:  # a template that refuses such a question
            return
        if not rewritten:
            self._point = Point(self._point.now)

    def _settled(self) -> Self:
        """A copy in which the open turn, if any, has ended."""
        twin = copy(self)
        twin._turns = [replace(turn) for turn in self._turns]
        twin.close()
        return twin

    def _instead(self, turns: int, text: str, draws: Any, options: Options) -> Iterator[str]:
        """Rewind and say, or leave all as it was where either is refused."""
        held = self._turns, self._point
        self._turns = [*self._turns]
        try:
            self.rewind(turns)
            if draws is not None:
                self._point = self._point._replace(now=self._point.now._replace(draws=draws))
            return self.say(text, **options)
        except BaseException:
            self._turns, self._point = held
            raise

    def _before(self, k: int) -> Point | None:
        """Where turn k began, while that is kept."""
        if k == 0 and self._start is not None:
            return self._turns[0].before or Point(self._start)
        return self._turns[k].before if k >= 0 else None

    # --- what of a rendering is new

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        for turn in turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def _render(self, turns: Sequence[Turn], text: str) -> str:
        """Turns and a new message; templates that print the date keep the day the session began."""
        messages = [*self._messages(turns), {"role": "user", "content": text}]
        return self._tokenizer.render_chat(messages, strftime_now=self._started.strftime)

    def _encoded(self, text: str, after: Moment) -> list[int]:
        encode = self._tokenizer.encode_continuation
        return encode(text) if after.position else self._tokenizer.encode(text, False)

    def _reading(self, text: str, moment: Moment) -> Steps[tuple[Moment, list[int]]]:
        """Read a text in blocks; the moment after it, and its ids."""
        ids = self._encoded(text, moment)
        for i in range(0, len(ids), BLOCK):
            block = ids[i : i + BLOCK]
            logits, state = self._lm.prefill(np.array([block], np.int32), moment.state)
            evaluate(logits, state)
            moment = moment.after(block, state, (), self._lm.config)
            yield
        return moment, ids

    def _plan(self, text: str) -> tuple[int, Moment, list[int]]:
        """Where saying `text` goes on from, and the ids to feed."""
        mark, moment, suffix = self._standing(text)
        return mark, moment, self._encoded(suffix, moment)

    def _standing(self, text: str) -> tuple[int, Moment, str]:
        """The latest kept mark whose text is how the conversation with `text` begins, its moment, and what follows.

        Mark 2k is the moment before turn k, mark 2k + 1 the one between its question and its answer. The text at a mark
        is what the template makes of the turns so far, from the same first turn on.
        """
        n = len(self._turns)
        for first in dict.fromkeys((max(0, n - FRAME), 0)):
            rendered = self._render(self._turns[first:], text)
            for k in range(n, first, -1):
                point, turn = self._point if k == n else self._turns[k].before, self._turns[k - 1]
                if point is None:
                    continue
                asked = self._render(self._turns[first : k - 1], turn.user)
                for said in (turn.said, turn.answer):  # with and without a space before the answer
                    if rendered.startswith(asked + said):
                        turn.said = said
                        return self._found(2 * k, point.now, rendered[len(asked + said) :])
                if point.asked is not None and rendered.startswith(asked):
                    return self._found(2 * k - 1, point.asked, rendered[len(asked) :])
        rendered = self._render(self._turns, text)
        if self._start is None or not rendered.startswith(self._read_ahead):
            raise SessionError("the chat template rewrites more of the conversation than this session keeps")
        return self._found(0, self._start, rendered[len(self._read_ahead) :])

    def _found(self, mark: int, moment: Moment, suffix: str) -> tuple[int, Moment, str]:
        fed = self._turns[mark // 2 :]
        if not all(turn.answer_whole for turn in fed) or not all(turn.user_whole for turn in fed[mark % 2 :]):
            raise SessionError("the chat template rewrites a text that was too long to be kept whole")
        return mark, moment, suffix

    def _ahead(self) -> str:
        """What every rendering has before the first question."""
        ahead = os.path.commonprefix([self._render((), "0"), self._render((), "1")])  # noqa: RUF071 - of characters
        if not self._render([Turn("0", "0")], "0").startswith(ahead):
            raise SessionError("read: this model's chat template moves what stands before the first question")
        return ahead

    def _forget(self, mark: int) -> None:
        """Drop the oldest states beyond the budget, and turns that neither a state nor the template needs."""
        held = 0
        for turn in reversed(self._turns):
            held += turn.before.nbytes if turn.before else 0
            if held > self._snapshot_bytes:
                turn.before = None
        n = len(self._turns)
        kept = next((k for k, turn in enumerate(self._turns) if turn.before), n)
        gone = min(n - KEPT_TURNS, kept - 1, (mark + 1) // 2 - 1)  # a turn's state needs the text of the one before
        if gone > 0:
            del self._turns[:gone]
            self._forgotten, self._start = self._forgotten + gone, None
