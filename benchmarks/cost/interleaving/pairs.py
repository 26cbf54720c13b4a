"""Prices from interleaved steps: the base and a variant take single steps in turn.

A machine that does other work slows whole stretches of time. Two neighbouring steps are slowed
alike, so a price is the median of the ratios of neighbours, never a ratio of medians or means.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

BASE = "base"
"""Name of the row that the others are compared with."""
WARM_UP = 4
"""Pairs that are not counted: the first steps fill caches and allocate."""

Seconds = tuple[float, float]
"""Of one step: wall time and processor time."""
Steps = Sequence[Seconds]


def interleave(
    base: Callable[[], Seconds], own: Callable[[], Seconds], pairs: int, warm_up: int = WARM_UP
) -> tuple[list[Seconds], list[Seconds]]:
    """Take pairs of steps, base first and variant first in turn: b v, v b, b v, …

    Both follow themselves and the other equally often, so neither has the warmer caches.

    Args:
        base: takes one step of the base and returns its seconds.
        own: the same of the variant.
        pairs: how many are counted.
        warm_up: how many come before them.

    Returns:
        Seconds of the base's and of the variant's steps, pair by pair.
    """
    times = []
    for number in range(warm_up + pairs):
        if number % 2:
            second, first = own(), base()
        else:
            first, second = base(), own()
        times.append((first, second))
    bases, owns = zip(*times[warm_up:], strict=True)
    return list(bases), list(owns)


def price(base: Steps, own: Steps) -> dict[str, float]:
    """Seconds of a variant's step, and what it costs over the base's.

    Args:
        base: steps of the base, pair by pair.
        own: steps of the variant.

    Returns:
        Medians: `seconds_per_step` and its `ratio` to the base's, both of wall time;
        `cpu_seconds_per_step` and `cpu_ratio`, of processor time.
    """
    walls, processors = (
        [ours[clock] / theirs[clock] for theirs, ours in zip(base, own, strict=True)]
        for clock in (0, 1)
    )
    return {
        "seconds_per_step": statistics.median(wall for wall, _ in own),
        "ratio": statistics.median(walls),
        "cpu_seconds_per_step": statistics.median(processor for _, processor in own),
        "cpu_ratio": statistics.median(processors),
    }


def mean_price(prices: Sequence[dict[str, float]]) -> dict[str, float]:
    """Geometric means of several measurements of one price: 0.98 and 1 / 0.98 make 1."""
    return {name: statistics.geometric_mean(one[name] for one in prices) for name in prices[0]}
