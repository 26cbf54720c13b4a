"""Work that several servers share: each takes the next job when it is free, and one may die."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from ..errors import DiffLoRAError

Job = TypeVar("Job")
LONGEST_PAUSE = 30.0
"""Seconds between two calls of a server that does not answer."""


class ServerDownError(DiffLoRAError):
    """A server does not answer, or not any more; the job was not at fault."""


class ServerUnfitError(DiffLoRAError):
    """A server cannot do this kind of work at all."""


class JobFailedError(DiffLoRAError):
    """A job failed on a server that goes on."""


@dataclass(frozen=True)
class Patience:
    """How long to try.

    Attributes:
        tries: of a job that fails, on whatever server.
        down: seconds to wait for a server that does not answer before it is given up.
        pause: seconds before it is asked again; twice as long each time.
    """

    tries: int = 3
    down: float = 60.0
    pause: float = 0.5


@dataclass(frozen=True)
class Outcome(Generic[Job]):
    """What became of a job: `failure` is empty where it is done."""

    job: Job
    failure: str


@dataclass(frozen=True)
class _Waiting(Generic[Job]):
    """A job that is to be done, and the servers where it failed, once for each try."""

    job: Job
    failed: tuple[str, ...] = ()


class SharedWork(Generic[Job]):
    """Jobs for servers; iterate over `run` to see what becomes of each.

    Args:
        servers: name to what does a job there, as in `ServerDownError` and the like. One thread
            calls it at a time.
        patience: see there.
        say: told of servers that do not answer.
    """

    def __init__(
        self,
        servers: Mapping[str, Callable[[Job], None]],
        patience: Patience,
        say: Callable[[str], None],
    ) -> None:
        self._servers, self._patience, self._say = servers, patience, say
        self._lock = threading.Condition()
        self._over = False

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome[Job]]:
        """Every job's outcome, as they come.

        Jobs that are left when all servers have been given up have none.

        Raises:
            Exception: what a server's function raises beside the errors of this module.
        """
        self._waiting = [_Waiting(job) for job in jobs]
        self._running, self._active = 0, set(self._servers)
        news: SimpleQueue[Any] = SimpleQueue()
        threads = [
            threading.Thread(target=self._serve, args=(name, do, news), daemon=True)
            for name, do in self._servers.items()
        ]
        for thread in threads:
            thread.start()
        left = len(threads)
        try:
            while left:
                item = news.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            with self._lock:
                self._over = True
                self._lock.notify_all()

    def _serve(self, name: str, do: Callable[[Job], None], news: SimpleQueue[Any]) -> None:
        """One server's thread: ends when there is nothing left for it, or it is given up."""
        since, pause = 0.0, self._patience.pause
        try:
            while (taken := self._take(name)) is not None:
                try:
                    do(taken.job)
                except JobFailedError as failure:
                    since, pause = 0.0, self._patience.pause
                    again = len(taken.failed) + 1 < self._patience.tries
                    self._end(_Waiting(taken.job, (*taken.failed, name)) if again else None)
                    if not again:
                        news.put(Outcome(taken.job, str(failure)))
                except ServerUnfitError as refusal:
                    self._end(taken)
                    self._say(f"{name} cannot do this and is left out: {refusal}")
                    break
                except ServerDownError as silence:
                    self._end(taken)
                    since = since or time.monotonic()
                    if time.monotonic() - since >= self._patience.down:
                        self._say(f"{name} is given up: {silence}")
                        break
                    if pause == self._patience.pause:
                        self._say(f"{name} does not answer ({silence}); its work goes to others.")
                    self._sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                else:
                    since, pause = 0.0, self._patience.pause
                    self._end(None)
                    news.put(Outcome(taken.job, ""))
        except BaseException as failure:  # for the thread that waits
            news.put(failure)
        with self._lock:
            self._active.discard(name)
            self._lock.notify_all()
        news.put(None)

    def _take(self, name: str) -> _Waiting[Job] | None:
        """The next job for a server; waits while others may give one back. None when all is done.

        What failed here is left to the others, as long as one of them has not tried.
        """
        with self._lock:
            while not self._over:
                for place, waiting in enumerate(self._waiting):
                    if name not in waiting.failed or self._active <= set(waiting.failed):
                        self._running += 1
                        return self._waiting.pop(place)
                if not self._running and not self._waiting:
                    return None
                self._lock.wait()
            return None

    def _end(self, left: _Waiting[Job] | None) -> None:
        """A job is done with, or waits again: what failed behind the others."""
        with self._lock:
            self._running -= 1
            if left is not None:
                self._waiting.insert(len(self._waiting) if left.failed else 0, left)
            self._lock.notify_all()

    def _sleep(self, seconds: float) -> None:
        """Waits, unless all is over before."""
        with self._lock:
            self._lock.wait_for(lambda: self._over, seconds)
