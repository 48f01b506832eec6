"""Conversations by id: each goes on from its own state, in memory or on the disk, and reads nothing twice.

What changes a session is done in steps by the model's thread (`Worker.perform`); what only tells of one may be called
from any. Where a state is lost or unusable it is computed again from the transcript. This module knows no HTTP.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import Any

from bmojo_edge.engine import LM
from bmojo_edge.generate import Options
from bmojo_edge.inspection import inspecting, kept
from bmojo_edge.server.scheduler import Job, Said, Scheduler
from bmojo_edge.server.session_folder import SessionFolder
from bmojo_edge.server.transcript import Told, Transcript
from bmojo_edge.session import Session, SessionError
from bmojo_edge.steps import Steps
from bmojo_edge.turn import Answering

logger = logging.getLogger(__name__)

ANSWERING = 2  # states an answer takes beside those its session keeps: its row of the batch, and the one before it
RESERVED = 1 + ANSWERING  # for a session that is used; more where its template rewrites answers


class SessionProblem(ValueError):
    """A request that cannot be met; the message says why."""


class UnknownSession(SessionProblem):
    """There is no session of this id."""


class SessionExists(SessionProblem):
    """There is one already."""


class SessionBusy(SessionProblem):
    """It is answering."""


class TooManySessions(SessionProblem):
    """There are as many as may be kept."""


class NotYet(SessionProblem):
    """It can be done as soon as others have ended: there is no memory for one more, or it is being worked on."""


class Record:
    """What is known of one session. `session` is None while its state is not in memory."""

    def __init__(self, name: str, transcript: Transcript) -> None:
        self.name, self.transcript = name, transcript
        self.told: Told = transcript.told(with_texts=False)
        self.session: Session | None = None
        self.busy = self.answering = False
        self.saved = ""  # hash of the state that is on the disk, or on its way there
        self.saving: Future[None] | None = None

    def note(self, kind: str, **more: Any) -> None:
        """An event, in the transcript and here. What the disk does not take now, it is given with the next event."""
        event = {"event": kind, "at": time.time(), **more}
        self.told.take(event)
        try:
            self.transcript.append(event)
        except OSError as error:
            logger.error("session %s: its transcript could not be written: %s", self.name, error)


class Sessions:
    """All sessions of a server: those of `folder`, or without one those of this process. At most `most`.

    `call` has something done by the model's thread. Raises SessionProblem from everything that names a session.
    """

    def __init__(
        self,
        lm: LM,
        scheduler: Scheduler,
        call: Callable[[Callable[[], None]], None],
        folder: SessionFolder | None = None,
        most: int = 10_000,
    ) -> None:
        self._lm, self._scheduler, self._call, self._folder, self._most = lm, scheduler, call, folder, most
        self._blank: Any = None  # a fresh state; made by the model's thread, as an engine's arrays belong to one
        self._slot = lm.config.state_bytes()
        names = [] if folder is None else folder.ids()
        self._records = {name: Record(name, self._transcript(name)) for name in names}
        self._unsaved: dict[str, None] = {}  # in the order in which they changed
        self._saving = False

    # --- telling, in any thread

    def listed(self) -> list[dict[str, Any]]:
        """All sessions as the API shows them, the one used last first."""
        records = sorted([*self._records.values()], key=lambda record: -record.told.updated)
        return [self._shown(record) for record in records]

    def shown(self, name: str) -> dict[str, Any]:
        """A session with its messages."""
        record = self._record(name)
        return {**self._shown(record), "messages": record.transcript.told().messages}

    def _shown(self, record: Record) -> dict[str, Any]:
        told = record.told
        return {
            "object": "session",
            "id": record.name,
            "title": told.shown_title,
            "created": int(told.created),
            "updated": int(told.updated),
            "turns": len(told.marks),
            "position": told.position,
            "bytes": self._slot,
        }

    # --- changing, by the model's thread

    def create(self, name: str | None, title: str | None) -> Steps[dict[str, Any]]:
        """A new session."""
        yield
        return self._shown(self._begin(name, title))

    def rename(self, name: str, title: str) -> Steps[dict[str, Any]]:
        """Give a session a title."""
        yield
        record = self._record(name)
        record.note("title", title=title)
        return self._shown(record)

    def delete(self, name: str) -> Steps[None]:
        """Remove a session, its state and its words."""
        yield
        with self._using(name):
            self._remove(self._records[name])

    def fork(self, name: str, turns: int | None) -> Steps[dict[str, Any]]:
        """A new session with the first `turns` turns of another."""
        yield
        with self._using(name) as record:
            told, count = record.transcript.told(), len(record.told.marks)
            first = count if turns is None else turns
            if not 0 <= first <= count:
                raise SessionProblem(f"turns: must be between 0 and the {count} there are, got {first}")
            session = self._found(record)
            twin = self._begin(None, told.title)
            for (user, answer), (position, found) in zip(told.exchanges[:first], told.marks[:first], strict=True):
                twin.note("turn", user=user, answer=answer, position=position, hash=found, system=told.system)
            if session is not None and first:
                with suppress(SessionError):  # its state is no longer kept: it is read when it is needed
                    twin.session = session.fork().rewind(count - first)
            self._settle(twin)
        return self._shown(twin)

    def rewind(self, name: str, turns: int) -> Steps[dict[str, Any]]:
        """Take back the last `turns` turns."""
        yield
        with self._using(name) as record:
            count = len(record.told.marks)
            if not 1 <= turns <= count:
                raise SessionProblem(f"turns: must be between 1 and the {count} there are, got {turns}")
            session = self._found(record)
            try:
                record.session = None if session is None or turns == count else session.rewind(turns)
            except SessionError:  # its state is no longer kept: it is read when it is needed
                record.session = None
            record.note("rewind", turns=turns)
        return self._shown(record)

    def memory(self, name: str, attention: bool) -> Steps[dict[str, Any]]:
        """What a session remembers, and with `attention` the memories its last answer was read from."""
        yield
        with self._using(name) as record:
            session = yield from self._opened(record)
            found = (yield from inspecting(session)) if attention else kept(session)
        return {**found.as_json(), "bytes": self._slot}

    def ask(
        self,
        name: str,
        system: str | None,
        text: str,
        options: Options,
        limit: int,
        tell: Callable[[Said | Exception], None],
        top: int,
    ) -> Steps[Job]:
        """The job of the next answer; the session is in use until it ends. At most `limit` tokens are read for it.

        `system` only begins a conversation.
        """
        yield
        fresh = name not in self._records
        record = self._begin(name, None) if fresh else self._record(name)
        try:
            self._take(record)
            try:
                if system is not None and record.told.marks:
                    raise SessionProblem("messages: a system message only begins a session; this one has begun")
                if system is not None:
                    record.told.system, record.session = system, None
                session = yield from self._opened(record)
                answering = session.ask(text, **options)
                new = len(answering.ids)
                if new > limit:
                    session.rewind()
                    raise SessionProblem(f"messages: have {new:,} new tokens; at most {limit:,} are read here")
                self._scheduler.reserve(name, max(RESERVED, self._states(session) + ANSWERING))
                record.answering = True
                return Job(answering.run, tell, top, owner=_Answer(self._settle, record, answering))
            except BaseException:
                self._settle(record)
                raise
        except BaseException:
            if fresh:
                self._remove(record)
            raise

    def save(self) -> None:
        """Save what is not saved, by the model's thread, as the last thing it does."""
        for name in self._unsaved:
            self._save(self._records[name])

    def close(self) -> None:
        """Wait until all is on the disk."""
        if self._folder is not None:
            self._folder.close()

    # --- how

    def _transcript(self, name: str) -> Transcript:
        return Transcript(None) if self._folder is None else self._folder.transcript(name)

    def _record(self, name: str) -> Record:
        try:
            return self._records[name]
        except KeyError:
            raise UnknownSession(f"there is no session {name!r}") from None

    def _begin(self, name: str | None, title: str | None) -> Record:
        name = secrets.token_hex(12) if name is None else name
        if name in self._records:
            raise SessionExists(f"there is a session {name!r} already")
        if len(self._records) >= self._most:
            raise TooManySessions(f"there are {self._most:,} sessions, as many as are kept here; delete some")
        record = Record(name, self._transcript(name))
        record.note("begin", title=title)
        self._records[name] = record
        return record

    def _remove(self, record: Record) -> None:
        del self._records[record.name]
        record.session = None
        self._scheduler.kept.release(record.name)
        self._unsaved.pop(record.name, None)
        if self._folder is not None:
            self._folder.delete(record.name)

    @contextmanager
    def _using(self, name: str) -> Iterator[Record]:
        record = self._record(name)
        self._take(record)
        try:
            yield record
        finally:
            self._settle(record)

    def _take(self, record: Record) -> None:
        """Nobody else uses the session now, and its states are not dropped."""
        if record.answering:
            raise SessionBusy(f"session {record.name!r} is in use; try again when its answer has ended")
        if record.busy:
            raise NotYet(f"session {record.name!r} is being read or looked into; try again in a moment")
        self._scheduler.kept.release(record.name)
        if not self._scheduler.reserve(record.name, RESERVED):
            self._settle(record)
            raise NotYet("as many sessions are in use as there is memory for; try again in a moment")
        record.busy = True

    def _settle(self, record: Record) -> None:
        """The session is no longer used; its state is saved soon, and stays in memory while there is room."""
        record.busy = record.answering = False
        self._scheduler.free(record.name)
        session = record.session
        if session is None or self._records.get(record.name) is not record:
            return
        now = session.rolling_hash
        if record.told.marks and now != record.told.hash:  # it was read from the transcript
            record.note("state", position=session.position, hash=now)

        def drop() -> None:
            if self._folder is not None and record.told.marks:
                if record.saved != now:
                    self._save(record)
                wait([record.saving] if record.saving else [])
            record.session = None
            self._unsaved.pop(record.name, None)

        if self._folder is not None and record.told.marks and record.saved != now:
            self._unsaved[record.name] = None
        self._scheduler.kept.hold(record.name, self._states(session), drop)
        self._scheduler.make_room()
        self._save_next()

    def _states(self, session: Session) -> int:
        return -(-session.held_bytes // self._slot)

    def _found(self, record: Record) -> Session | None:
        """The session in memory or on the disk, if its state is that of its transcript."""
        path = None if self._folder is None else self._folder.state(record.name)
        if record.session is None and record.told.marks and path is not None:
            try:
                session = Session.open(path, self._lm, snapshot_bytes=0)
                if session.rolling_hash != record.told.hash:
                    raise SessionError(f"{path}: is not the state its transcript led to")
                record.session, record.saved = session, session.rolling_hash
            except (SessionError, OSError) as error:
                logger.warning("session %s: its state is computed again: %s", record.name, error)
        return record.session

    def _opened(self, record: Record) -> Steps[Session]:
        """The session, read again from its transcript where its state is lost."""
        session = self._found(record)
        if session is None:
            if self._blank is None:
                self._blank = self._lm.init_state()
            session = Session(self._lm, record.told.system, snapshot_bytes=0, blank=self._blank)
            if record.told.marks:
                yield from session.retell(record.transcript.told().exchanges)
            record.session = session
        return session

    def _save(self, record: Record) -> None:
        """Copy the state, and write it in another thread."""
        assert self._folder is not None and record.session is not None
        record.saved = record.session.rolling_hash

        def end(future: Future[None]) -> None:
            if (error := future.exception()) is not None:
                record.saved = ""
                logger.error("session %s: its state could not be saved: %s", record.name, error)

        record.saving = self._folder.save(record.name, record.session.packed())
        record.saving.add_done_callback(end)

    def _save_next(self) -> None:
        """Save the states that have changed one after another, so that there is one copy at a time."""
        name = next((name for name in self._unsaved if not self._records[name].busy), None)
        if self._saving or name is None:
            return
        del self._unsaved[name]
        record, self._saving = self._records[name], True
        self._save(record)
        assert record.saving is not None
        record.saving.add_done_callback(lambda _: self._call(self._saved))

    def _saved(self) -> None:
        self._saving = False
        self._save_next()


class _Answer:
    """The owner of a job: the session it belongs to."""

    def __init__(self, settle: Callable[[Record], None], record: Record, answering: Answering) -> None:
        self._settle, self._record, self._answering = settle, record, answering

    def entered(self, state: Any) -> None:
        """The prompt is read but for its last token."""
        self._answering.asked = state, tuple(self._answering.run.pending)

    def left(self, state: Any) -> None:
        """The turn ends with what was said so far, or is taken back where that is nothing."""
        record, run, session = self._record, self._answering.run, self._record.session
        assert session is not None
        try:
            if state is None or not (run.ids or run.finish_reason):
                session.rewind()
            else:
                run.state = state
                session.close()
                turn = session.turns[-1]
                record.note(
                    "turn",
                    user=turn.user,
                    answer=turn.answer,
                    finish_reason=turn.finish_reason,
                    position=session.position,
                    hash=session.rolling_hash,
                    system=session.system,
                )
        except Exception:  # concerns nobody else: the session is read from its transcript when it is used again
            logger.exception("session %s: its state is lost", record.name)
            record.session = None
        self._settle(record)
