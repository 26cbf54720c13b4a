"""Statistics over identities, and their tables as JSON and Markdown.

Average over the prompts of a person first, then over people; intervals resample people, because
pictures of one person are not independent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor] | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over identities (Efron 1979) of a function of column means.

    Args:
        values: (I,) or (I, C), one row per identity.
        statistic: maps column means (..., C) to (...); None takes the only column.
        level: coverage.
        draws: resamples.
        seed: of the resampling.

    Returns:
        The statistic of all identities and its interval; NaN resamples are left out.

    Raises:
        ConfigError: no identities, or several columns without a statistic.
    """
    table = values.double()
    table = table[:, None] if table.ndim == 1 else table
    if not len(table) or (statistic is None and table.shape[1] != 1):
        raise ConfigError("A bootstrap needs at least one identity and one statistic to compute.")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(table), (draws, len(table)), generator=generator)
    return _percentiles(table.mean(0), table[rows].mean(1), statistic, level)


def crossed_interval(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor] | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """A function of the means of a table whose rows and columns are both drawn by chance.

    Rows and columns are resampled independently (Owen's pigeonhole bootstrap, 2007), so what
    one training seed does to all people counts as one draw, as does one person under all seeds. Few
    rows make it too narrow by sqrt((S - 1) / S) in their part; a single row adds nothing.

    Args:
        values: (S, I) of S training seeds and I identities, or (S, I, C) of several numbers each.
        statistic: maps their means (..., C) to (...); None takes the only one.
        level: coverage.
        draws: resamples.
        seed: of the resampling.

    Returns:
        The statistic of the whole table and its interval; NaN resamples are left out.

    Raises:
        ConfigError: an empty table, or several numbers without a statistic.
    """
    table = values.double()
    table = table[..., None] if table.ndim == 2 else table
    if table.ndim != 3 or not table.numel():
        raise ConfigError("An interval over seeds and identities needs at least one of each.")
    if statistic is None and table.shape[2] != 1:
        raise ConfigError("An interval of several numbers needs a statistic to compute.")
    return _percentiles(table.mean((0, 1)), crossed_means(table, draws, seed), statistic, level)


def _percentiles(
    whole: Tensor, resampled: Tensor, statistic: Callable[[Tensor], Tensor] | None, level: float
) -> Interval:
    """A statistic of means (C,), and its percentiles over their resamples (draws, C)."""
    statistic = statistic or (lambda means: means[..., 0])
    results = statistic(resampled)
    tail = (1 - level) / 2
    levels = torch.tensor([tail, 1 - tail], dtype=results.dtype)
    low, high = results.nanquantile(levels).tolist()
    return Interval(float(statistic(whole)), low, high)


def crossed_means(values: Tensor, draws: int, seed: int = 0) -> Tensor:
    """Means (draws, C) of resamples of a table (S, I, C), see `crossed_interval`."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (_resampled(size, draws, generator) for size in values.shape[:2])
    return torch.einsum("ds,sic,di->dc", rows, values.double(), columns)


def _resampled(size: int, draws: int, generator: torch.Generator) -> Tensor:
    """Shares (draws, size) that each of `size` rows has of a resample with replacement."""
    rows = torch.randint(size, (draws, size), generator=generator)
    counts = torch.zeros(draws, size, dtype=torch.float64)
    return counts.scatter_add_(1, rows, torch.ones(rows.shape, dtype=torch.float64)) / size


def recovered_share(predicted: Tensor, base: Tensor, best: Tensor, seed: int = 0) -> Interval:
    """(predicted - base) / (best - base) over identities, with a 95 % bootstrap (ours).

    The ratio of mean gains, not the mean of ratios, so that a person on whom nothing helps does
    not decide. Signs cancel: an error, where less is better, is used as it is.

    Args:
        predicted: (I,) a metric of each identity.
        base: (I,) the same without any adaptation.
        best: (I,) the same for the per-identity training that serves as yardstick.
        seed: of the resampling.
    """

    def share(means: Tensor) -> Tensor:
        return (means[..., 0] - means[..., 1]) / (means[..., 2] - means[..., 1])

    return bootstrap_interval(torch.stack([predicted, base, best], 1), share, seed=seed)


def share_improved(values: Tensor, base: Tensor, lower_is_better: bool = False) -> float:
    """Share of identities (I,) that are better than under the base model."""
    better = values < base if lower_is_better else values > base
    return float(better.float().mean())


@dataclass(frozen=True)
class Report:
    """A table with what is needed to repeat it.

    `rows`: row name to column name to value; `facts`: everything else that belongs to the result
    (seed, commit, machine, counts, versions), JSON only.
    """

    rows: Mapping[str, Mapping[str, float]]
    facts: Mapping[str, object] = field(default_factory=dict)

    def columns(self) -> list[str]:
        """Column names in the order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))

    def to_json(self) -> str:
        """`{"rows": ..., **facts}`; a number that is not finite becomes null."""
        document = _finite({"rows": self.rows, **self.facts})
        return json.dumps(document, indent=1, allow_nan=False)

    def to_markdown(self, digits: Mapping[str, int] | None = None) -> str:
        """A table for a README.

        Args:
            digits: decimals of a column, 3 unless given.
        """
        digits = digits or {}
        columns = self.columns()
        lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, row in self.rows.items():
            cells = [_cell(row.get(column), digits.get(column, 3)) for column in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def _cell(value: float | None, digits: int) -> str:
    """One number of a table; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _finite(value: object) -> object:
    """JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
