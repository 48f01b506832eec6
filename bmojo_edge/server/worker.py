"""The thread that owns the model: it alone calls the scheduler, everyone else hands it jobs.

This module knows threads and how many jobs may be open at a time; it knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from bmojo_edge.server.scheduler import Counts, Job, Said, Scheduler

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
        self._lock = threading.Lock()
        self._closing = False
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
            if self._closing:
                raise Closed
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

    def close(self) -> None:
        """End all jobs with Closed, and the thread; returns when it has ended."""
        with self._lock:
            self._closing = True
            self._calls.put(lambda: self._scheduler.fail(Closed("the server is shutting down")))
        if self._thread.ident is not None:
            self._thread.join()

    def _forget(self, job: Job) -> None:
        with self._lock:
            self._open.discard(job)

    def _work(self) -> None:
        while not (self._closing and self._calls.empty() and not self._scheduler.busy):
            try:
                while self._calls.qsize() or not self._scheduler.busy:
                    self._calls.get()()
                    if self._closing and self._calls.empty():
                        break
                if self._scheduler.busy:
                    self._scheduler.step()
            except Exception as error:  # whatever the model raises must reach those who wait, and not end the thread
                logger.exception("a step failed; the jobs that were open end with an error")
                self._scheduler.fail(error)
