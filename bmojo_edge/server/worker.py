"""The thread that owns the model: it alone calls the scheduler, everyone else hands it jobs.

This module knows threads and how many jobs may be open at a time; it knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from bmojo_edge.server.scheduler import Counts, Job, Said, Scheduler
from bmojo_edge.steps import Steps

T = TypeVar("T")

PIECES = 0.02  # seconds of tasks between two steps, at least one piece

logger = logging.getLogger(__name__)


class Busy(Exception):
    """As many jobs are open as may be; try again later."""


class Closed(Exception):
    """The worker is shutting down."""


class Worker:
    """Runs a scheduler in a thread of its own. At most `max_open` jobs are waiting or being answered at a time."""

    def __init__(self, scheduler: Scheduler, max_open: int) -> None:
        self._scheduler, self._max_open = scheduler, max_open
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._open: set[Job] = set()
        self._tasks: deque[tuple[Steps[Any], Future[Any]]] = deque()  # the thread's own
        self._lock = threading.Lock()
        self._refusing = self._closing = False
        self._thread = threading.Thread(target=self._work, name="bmojo-edge model", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are being worked on."""
        return self._thread.is_alive()

    @property
    def counts(self) -> Counts:
        """How many jobs are where; those handed in and not taken yet are waiting."""
        counts = self._scheduler.counts
        return counts._replace(waiting=max(0, len(self._open) - counts.reading - counts.running))

    def submit(self, job: Job) -> None:
        """Hand a job in; `job.tell` is called from the worker's thread. Raises Busy or Closed."""
        tell = job.tell

        def told(event: Said | Exception) -> None:
            if isinstance(event, Exception) or event.token.finish_reason is not None:
                self._forget(job)
            tell(event)

        job.tell = told
        with self._lock:
            self._check_open()
            if len(self._open) >= self._max_open:
                raise Busy
            self._open.add(job)
            self._calls.put(lambda: self._scheduler.submit(job))

    def cancel(self, job: Job) -> None:
        """End a job where it is; nothing happens if it has ended."""
        with self._lock:
            if job not in self._open:
                return

        def end() -> None:
            self._scheduler.cancel(job)
            self._forget(job)

        self._calls.put(end)

    def perform(self, task: Steps[T]) -> Future[T]:
        """Do something with the model's thread to oneself, in pieces between the steps of the jobs; tasks take turns.

        Raises Closed.
        """
        future: Future[T] = Future()

        def begin() -> None:
            if future.set_running_or_notify_cancel():
                self._tasks.append((task, future))

        with self._lock:
            self._check_open()
            self._calls.put(begin)
        return future

    def call(self, what: Callable[[], None]) -> None:
        """Have something short done by the thread; nothing happens once it has ended."""
        self._calls.put(what)

    def end(self) -> None:
        """End all jobs and tasks with Closed, and take no more."""
        with self._lock:
            self._refusing = True
            self._calls.put(self._end)

    def close(self, then: Callable[[], None]) -> None:
        """`end`, do a last thing, and end the thread; returns when it has ended."""
        self.end()
        with self._lock:
            self._closing = True
            self._calls.put(then)
        if self._thread.ident is not None:
            self._thread.join()

    def _check_open(self) -> None:
        if self._refusing:
            raise Closed("the server is shutting down")

    def _end(self) -> None:
        closed = Closed("the server is shutting down")
        self._scheduler.end(closed)
        while self._tasks:
            task, future = self._tasks.popleft()
            task.close()
            future.set_exception(closed)

    def _forget(self, job: Job) -> None:
        with self._lock:
            self._open.discard(job)

    def _work(self) -> None:
        while not (self._closing and self._calls.empty() and not self._busy):
            try:
                while self._calls.qsize() or not self._busy:
                    self._calls.get()()
                    if self._closing and self._calls.empty():
                        break
                end = time.monotonic() + PIECES
                while self._tasks and time.monotonic() < end:
                    self._do_a_piece()
                if self._scheduler.busy:
                    self._scheduler.step()
            except Exception as error:  # whatever the model raises must reach those who wait, and not end the thread
                logger.exception("a step failed; the jobs that were open end with an error")
                self._scheduler.fail(error)

    @property
    def _busy(self) -> bool:
        return self._scheduler.busy or bool(self._tasks)

    def _do_a_piece(self) -> None:
        task, future = self._tasks.popleft()
        try:
            next(task)
        except StopIteration as end:
            future.set_result(end.value)
        except Exception as error:  # is whose task it was
            future.set_exception(error)
        else:
            self._tasks.append((task, future))
