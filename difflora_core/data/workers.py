"""The same work on many things, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Protocol, TypeVar

from ..errors import DatasetError
from .ray_workers import RayWorkers

Job = TypeVar("Job")
Result = TypeVar("Result")
AHEAD = 2
"""Jobs that wait for a worker, for each worker: more would only fill the memory."""


class Crew(Protocol):
    """Workers of any engine; a context."""

    @property
    def alone(self) -> bool:
        """Whether the work is done in this process."""

    def __enter__(self) -> Crew: ...

    def __exit__(self, *failure: object) -> None: ...

    def each(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """What `work` gives for each job, in the order of the jobs; see `Workers.each`."""


def open_workers(count: int, ray: str = "", gpus: float = 0.0) -> Crew:
    """Workers: processes of this machine, or of a Ray cluster.

    Args:
        count: of them; 1 does the work here. On a cluster 0 takes all that it has.
        ray: address of the cluster, see `RayWorkers`; empty takes processes.
        gpus: that each worker of a cluster needs.

    Raises:
        ConfigError: Ray is not installed.
    """
    return RayWorkers(ray, count, gpus) if ray else Workers(count)


class Workers:
    """Processes that do one kind of work after the other; a context.

    Args:
        count: of them; 1 or fewer start none, and the work is done here.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    @property
    def alone(self) -> bool:
        """Whether the work is done in this process."""
        return self._count <= 1

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def each(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """What `work` gives for each job, in the order of the jobs.

        Args:
            work: a function that can be sent to another process, as jobs and results must be.
            jobs: taken one by one, a few ahead of what is done.

        Raises:
            DatasetError: a process died, as for want of memory.
            Exception: what `work` raises.
        """
        if self.alone:
            yield from map(work, jobs)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy locks of threads
            self._pool = ProcessPoolExecutor(self._count, context, initializer=_begin)
        waiting: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                waiting.append(self._pool.submit(work, job))
                if len(waiting) >= AHEAD * self._count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as death:
            raise DatasetError(
                "A worker process died, most often for want of memory. What was done is kept: run "
                "the same again with fewer workers."
            ) from death


def _begin() -> None:
    """Makes a worker: the cores are shared, Ctrl-C is its parent's matter, and it ends with it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when the first job imports torch
    if not sys.warnoptions:  # notices of libraries to their programmers, as in the command itself
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, killed ones included."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
    os._exit(1)
