"""One exchange of a conversation, and what is kept of it. This module knows texts, ids and moments, no templates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bmojo_edge.generate import Continuation
from bmojo_edge.moment import Moment

SAVED_TEXT = 2**14  # characters of a text in a file; of a longer one its beginning and end


class Point(NamedTuple):
    """Between two turns: the moment, and that before the last answer where the template may rewrite the answer."""

    now: Moment
    asked: Moment | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its states."""
        return self.now.nbytes + (self.asked.nbytes if self.asked else 0)


@dataclass(slots=True)
class Turn:
    """One exchange.

    `answer_ids` are the ids of the answer, but for one that was read from a file: only the last has them.
    """

    user: str
    answer: str = ""
    answer_ids: list[int] = field(default_factory=list)
    said: str = ""  # the answer as it continues the prompt: a word's own space before it included
    finish_reason: str | None = None  # None: interrupted
    user_whole: bool = True  # False: only beginning and end of a long text were saved
    answer_whole: bool = True
    before: Point | None = None  # where it began, while kept


@dataclass(slots=True)
class Answering:
    """The turn being answered."""

    run: Continuation
    base: Moment  # what it goes on from
    ids: list[int]  # of its prompt
    rng: np.random.Generator
    asked: tuple[Any, tuple[int, ...]] | None = None  # the state before the answer, and ids of the prompt not in it


def turn_as_saved(turn: Turn, settled: bool, answer_settled: bool, last: bool) -> dict[str, Any]:
    """A turn's fields for a file; settled texts that are long keep their beginning and end."""
    user, answer = (
        text[: SAVED_TEXT // 2] + text[-SAVED_TEXT // 2 :] if short and len(text) > SAVED_TEXT else text
        for text, short in ((turn.user, settled), (turn.answer, answer_settled))
    )
    space = turn.said[: len(turn.said) - len(turn.answer)] if turn.said.endswith(turn.answer) else None
    said = turn.said if space is None else space + answer
    return {
        "user": user,
        "answer": answer,
        "answer_ids": turn.answer_ids if last and len(turn.answer_ids) <= SAVED_TEXT else [],
        "said": said,
        "finish_reason": turn.finish_reason,
        "user_whole": turn.user_whole and user == turn.user,
        "answer_whole": turn.answer_whole and answer == turn.answer,
    }
