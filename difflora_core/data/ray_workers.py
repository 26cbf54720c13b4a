"""The same work on many things by the machines of a Ray cluster (optional: ray.io).

The folders that are read and written must be the same on all machines. A job whose machine is lost
is done again on another; what jobs write is whole or not there, and the same whoever writes it.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from ..errors import ConfigError, DatasetError, shown
from .libraries import INSTALL

Job = TypeVar("Job")
Result = TypeVar("Result")
HERE = "local"
"""Address that starts a cluster of this machine alone."""
RETRIES = 5
"""How often a job is done again whose process or machine is lost."""
AHEAD = 2
"""Jobs that wait for a worker, for each worker."""
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_grpc_client_keepalive_time_ms": "15000",
    "RAY_grpc_client_keepalive_timeout_ms": "15000",
}
"""Ray tells nobody of its use, and asks every quarter of a minute whether a machine that computes
for it still answers. By itself it waits for more than six minutes for one that is unplugged."""
KNOCK = 10.0
"""Seconds in which a cluster has to answer."""


class RayWorkers:
    """Workers of a Ray cluster; a context, and used as `workers.Workers`.

    Args:
        address: of the cluster, "auto" for the one that runs here, "local" to start one.
        count: jobs at a time; 0 takes the cluster's processors, as many as it has at the time.
        gpus: of each job, parts allowed.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """

    alone = False

    def __init__(self, address: str, count: int = 0, gpus: float = 0.0) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise ConfigError(f"Ray is not installed ({error}). Run: {INSTALL}") from error
        self._address, self._count, self._gpus = address, count, gpus
        self._pending: deque[Any] = deque()

    def __enter__(self) -> RayWorkers:
        alone = {"num_cpus": self._count or None, "include_dashboard": False}
        where = alone if self._address == HERE else {"address": self._address}
        stops = signal.getsignal(signal.SIGTERM)
        try:
            _knock(self._address)
            self._ray.init(log_to_driver=False, logging_level="ERROR", **where)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, stops)  # Ray puts its own in its place
        except (OSError, RuntimeError, ValueError) as failure:
            raise ConfigError(
                f"There is no Ray cluster at {shown(self._address)}: {shown(str(failure), 200)} "
                f"Start one with: ray start --head; or name {HERE}."
            ) from failure
        return self

    def __exit__(self, *failure: object) -> None:
        for left in self._pending:
            self._ray.cancel(left, force=True)
        self._ray.shutdown()

    @property
    def _at_once(self) -> int:
        return self._count or max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def each(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """What `work` gives for each job, in the order of the jobs; see `Workers.each`.

        Raises:
            DatasetError: a job's process or machine was lost again and again.
            Exception: what `work` raises.
        """
        do = self._ray.remote(_call).options(
            num_cpus=1, num_gpus=self._gpus, max_retries=RETRIES, scheduling_strategy="SPREAD"
        )
        shared = self._ray.put(work)
        self._pending = deque()
        for job in jobs:
            self._pending.append(do.remote(shared, job))
            if len(self._pending) >= AHEAD * self._at_once:
                yield self._result()
        while self._pending:
            yield self._result()

    def _result(self) -> Any:
        """What the oldest job gave."""
        errors = self._ray.exceptions
        try:
            result = self._ray.get(self._pending[0])
        except errors.RayTaskError as failure:
            raise failure.cause or failure from failure
        except errors.RayError as loss:
            raise DatasetError(
                f"Workers of the Ray cluster were lost {RETRIES} times over the same job, most "
                "often for want of memory. What was done is kept: run the same again with fewer at "
                "a time."
            ) from loss
        self._pending.popleft()
        return result


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at host:port; Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), KNOCK).close()


def _call(work: Callable[[Job], Result], job: Job) -> Result:
    """Runs on a worker."""
    return work(job)
