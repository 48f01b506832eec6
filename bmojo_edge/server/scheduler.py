"""Many continuations in one batch: who is read, who is decoded, whose state is kept.

A step reads one block of prompts and decodes one token of every running continuation, so a long prompt delays
the others by a block and not by itself. All but the last token of a prompt is read alone; the last one enters the
batch. This module calls the model; it knows nothing of HTTP, threads or time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from bmojo_edge.engine import LM, evaluate, evaluate_rows, join_rows, take_rows
from bmojo_edge.generate import Continuation, Token
from bmojo_edge.server.kept import Ids, KeptStates

ALONE = 4  # times the block that is read at once while nobody waits for a token


class Said(NamedTuple):
    """A generated token, and the likeliest tokens in its place with their natural-log probabilities."""

    token: Token
    likeliest: tuple[tuple[int, float], ...]


class Counts(NamedTuple):
    """How many continuations are where."""

    waiting: int
    reading: int
    running: int
    kept: int  # states


class Owner(Protocol):
    """Who keeps the states of a job instead of the scheduler, as a session does. It has reserved what that takes."""

    def entered(self, state: Any) -> None:
        """The prompt is read but for its last token; this is the state."""
        ...

    def left(self, state: Any) -> None:
        """The job is over, in this state; None where nothing was said or what was said cannot be trusted."""
        ...


class Job:
    """One continuation: what is to be said, and to whom. `top`: how many of the likeliest tokens are told.

    `tell` is called with every token, in order, or once with the exception that ended the job. With an owner, the
    prompt goes on from the state of `run`; else from the kept state that has taken in most of it.
    """

    def __init__(
        self,
        run: Continuation,
        tell: Callable[[Said | Exception], None],
        top: int = 0,
        owner: Owner | None = None,
    ) -> None:
        self.run, self.tell, self.top, self.owner = run, tell, top, owner
        self.prompt: Ids = np.array(run.pending, np.int32)
        self.past = 0 if owner is None else int(run.state.position[0])  # tokens that came before the prompt
        self.cached = self.past  # tokens of past and prompt that a state had taken in already
        self.read = 0  # tokens of the prompt that `state` has taken in
        self.state: Any = run.state  # of one row, until it enters the batch

    @property
    def unread(self) -> int:
        """Tokens of the prompt, but for its last one, that are still to be read."""
        return len(self.prompt) - 1 - self.read


class Scheduler:
    """Moves jobs forward, at most `max_running` at a time, holding at most `slots` states.

    `block` is how many tokens of a prompt are read between two tokens of the others. The caches of full attention
    grow, so models that have them are refused (ValueError).
    """

    def __init__(self, lm: LM, slots: int, max_running: int = 16, block: int = 128) -> None:
        if lm.config.growing_layers:
            raise ValueError(
                "this model has full attention, whose state grows with every token; the server batches states of fixed "
                "size: convert the model with --window"
            )
        if slots < 1 or max_running < 1 or block < 1:
            raise ValueError(f"slots, max_running and block: must be at least 1, got {slots}, {max_running}, {block}")
        self._lm, self._slots, self._block = lm, slots, block
        self._max_running = min(max_running, slots)
        self._waiting: deque[Job] = deque()
        self._reading: deque[Job] = deque()
        self._running: list[Job] = []  # in the order of the batch's rows
        self._batch: Any = None  # their state, None without rows
        self._kept = KeptStates()
        self._reserved: dict[str, int] = {}

    @property
    def kept(self) -> KeptStates:
        """The states that nobody is using."""
        return self._kept

    def reserve(self, name: str, states: int) -> bool:
        """Set states aside for a session that is used, those of its answer included; False where there are too few.

        One session is always let in.
        """
        held = sum(count for other, count in self._reserved.items() if other != name)
        if held and held + states > self._slots:
            return False
        self._reserved[name] = states
        self.make_room()
        return True

    def free(self, name: str) -> None:
        """Give back what was reserved."""
        self._reserved.pop(name, None)

    def make_room(self) -> None:
        """Drop what nobody uses as far as the room is needed."""
        self._kept.shrink(self._slots - self._in_use())

    @property
    def counts(self) -> Counts:
        """How many jobs are waiting, reading their prompt and decoding, and how many states are kept beside them."""
        return Counts(len(self._waiting), len(self._reading), len(self._running), len(self._kept))

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or self._reading or self._running)

    def submit(self, job: Job) -> None:
        """Put a job in the queue."""
        self._waiting.append(job)

    def cancel(self, job: Job) -> None:
        """End a job where it is, if it has not ended; its place is free at once."""
        for queue in (self._waiting, self._reading):
            if job in queue:
                queue.remove(job)
                if job.owner is not None:
                    job.owner.left(None)
        if job in self._running:
            self._leave([job])

    def end(self, error: Exception) -> None:
        """End every job where it is, and tell it why."""
        for job in [*self._waiting, *self._reading, *self._running]:
            self.cancel(job)
            job.tell(error)

    def fail(self, error: Exception) -> None:
        """End every job with an error: the batch cannot be trusted after the model has raised one."""
        jobs = [*self._waiting, *self._reading, *self._running]
        self._waiting.clear()
        self._reading.clear()
        self._running, self._batch = [], None
        for job in jobs:
            if job.owner is not None:
                job.owner.left(None)
            job.tell(error)

    def step(self) -> None:
        """Read a block of prompts, then decode one token of every job whose prompt is read."""
        self._admit()
        self._read()
        self._enter()
        if self._running:
            self._decode()

    # --- reading

    def _admit(self) -> None:
        while len(self._reading) + len(self._running) < self._max_running:
            room = self._slots - self._in_use()
            job = next((job for job in self._waiting if job.owner is not None or room > 0), None)
            if job is None:
                return
            self._waiting.remove(job)
            if job.owner is None:
                found = self._kept.longest(job.prompt[:-1])
                job.read = job.cached = 0 if found is None else len(found.ids)
                job.state = self._lm.init_state() if found is None else found.state
            self._reading.append(job)
            self.make_room()

    def _read(self) -> None:
        """A block of the prompt whose turn it is, and of the others those whose rest has room beside it."""
        left = self._block if self._running else ALONE * self._block
        job = next((job for job in self._reading if job.unread), None)
        while job is not None:
            ids = job.prompt[job.read : job.read + min(left, job.unread)]
            self._reading.remove(job)
            self._reading.append(job)
            logits, job.state = self._lm.prefill(ids[None], job.state)
            evaluate(logits, job.state)
            job.read += len(ids)
            left -= len(ids)
            job = next((job for job in self._reading if 0 < job.unread <= left), None)

    def _enter(self) -> None:
        """Jobs whose prompt is read enter the batch; what they have read is kept as well, where there is room."""
        ready = [job for job in self._reading if not job.unread]
        if not ready:
            return
        self._batch = join_rows([*([] if self._batch is None else [self._batch]), *(job.state for job in ready)])
        for job in ready:
            self._reading.remove(job)
            self._running.append(job)
            job.run.pending = [int(job.prompt[-1])]
            if job.owner is None:
                self._kept.put(job.prompt[:-1], job.state)
            else:
                job.owner.entered(job.state)
            job.state = None
        self.make_room()

    def _in_use(self) -> int:
        """States of answers, and those reserved; a job with an owner is among the latter."""
        rows = sum(job.owner is None for job in (*self._reading, *self._running))
        return rows + sum(self._reserved.values())

    # --- decoding

    def _decode(self) -> None:
        tokens = np.array([job.run.pending[0] for job in self._running], np.int32)
        logits, self._batch = self._lm.decode_one_token(tokens, self._batch)
        rows = evaluate_rows(logits, self._batch)
        told: list[tuple[Job, Said | Exception]] = []
        for job, row in zip(self._running, rows, strict=True):
            job.run.pending = []
            try:
                told.append((job, Said(job.run.take(row), likeliest(row, job.top))))
            except Exception as error:  # no number, or an option nobody thought of: it concerns this job alone
                told.append((job, error))
        broken = [job for job, event in told if isinstance(event, Exception)]
        ended = [job for job, event in told if isinstance(event, Said) and event.token.finish_reason is not None]
        self._leave(ended, broken)
        for job, event in told:
            job.tell(event)

    def _leave(self, ended: Sequence[Job], broken: Sequence[Job] = ()) -> None:
        """Jobs leave the batch; the states of those that `ended` are kept, where there is room."""
        if not ended and not broken:
            return
        for job in ended:
            state = take_rows(self._batch, [self._running.index(job)])
            if job.owner is None:
                ids = np.array([*job.prompt, *job.run.ids], np.int32)
                self._kept.put(ids[: len(ids) - len(job.run.pending)], state)  # what the state has taken in
            else:
                job.owner.left(state)
        for job in broken:
            if job.owner is not None:
                job.owner.left(None)
        left = [i for i, job in enumerate(self._running) if job not in ended and job not in broken]
        self._batch = take_rows(self._batch, left) if left else None
        self._running = [self._running[i] for i in left]
        self.make_room()


def likeliest(logits: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens under logits (v,), likeliest first, with natural-log probabilities."""
    if not count:
        return ()
    count = min(count, logits.size)
    top = np.argpartition(logits, -count)[-count:]
    top = top[np.lexsort((top, -logits[top]))]
    scores = logits.astype(np.float64) - logits.max()
    scores -= np.log(np.exp(scores).sum())
    return tuple((int(i), float(scores[i])) for i in top)
