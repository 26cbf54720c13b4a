"""How far a stage is: done of all, how fast, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

EVERY = 30.0
"""Seconds between two lines where there is no terminal to draw a bar in."""


class Watch:
    """A bar in a terminal, else a line now and then; called as (done, total, metrics).

    It is what `loop.train` takes as `progress`. Use it in a `with` block.

    Args:
        stage: its name.
        console: where the bar or the lines go.
        log: also gets the lines; None keeps silent altogether, for all processes but one.
        clock: seconds.
    """

    def __init__(
        self,
        stage: str,
        console: Console,
        log: Callable[[str], None] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self._console, self._log, self._clock = stage, console, log, clock
        self._bar = Progress(
            *(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}")),
            console=console,
            disable=log is None or not console.is_terminal,
        )
        self._row = self._bar.add_task(stage, total=None, words="")
        self._first: tuple[float, int] | None = None
        self._told = -EVERY

    def __call__(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Tells that `done` of `total` are done, with the metrics of the last of them."""
        now = self._clock()
        self._first = self._first or (now, done)
        words = f"{done}/{total}{self._pace(now, done, total)}{_in_words(metrics)}"
        self._bar.update(self._row, completed=done, total=total, words=words)
        if self._log is not None and (now - self._told >= EVERY or done >= total):
            self._told = now
            self._log(f"{self.stage} {words}")
            if self._bar.disable:
                self._console.print(f"{self.stage} {words}")

    def _pace(self, now: float, done: int, total: int) -> str:
        """Rate and time left, counted from the first call: what an earlier run did is not ours."""
        begun, before = self._first or (now, done)
        if done <= before or now <= begun:
            return ""
        rate = (done - before) / (now - begun)
        pace = f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"
        return f", {pace}, {duration((total - done) / rate)} left"

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    """A time in words: "40 s", "12 min", "3.5 h", "2.1 days".

    Args:
        seconds: 0 or more.
    """
    for unit, size, most in (("s", 1, 90), ("min", 60, 5400), ("h", 3600, 172_800)):
        if seconds < most:
            count = seconds / size
            return f"{count:.0f} {unit}" if count >= 10 or unit == "s" else f"{count:.1f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def _in_words(metrics: Mapping[str, float]) -> str:
    """Metrics after a comma."""
    return "".join(f", {name} {value:.4g}" for name, value in metrics.items())
