"""Intervals of the rows, and whether the paper's ordering of them holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from difflora_core.evaluation.report import bootstrap_interval

Runs = Mapping[str, Sequence[Mapping[str, Tensor]]]
"""Row to the columns (P,) of its runs: of every style by every training seed."""
DRAWS = 2000


def over_prompts(runs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Columns (P,): means over runs. Prompts are what is resampled: runs are few."""
    return {name: torch.stack([run[name] for run in runs]).mean(0) for name in runs[0]}


def intervals(runs: Runs) -> dict[str, dict[str, list[float]]]:
    """Row to column to the low and high end of its 95 % interval over prompts."""
    found: dict[str, dict[str, list[float]]] = {}
    for row, each in runs.items():
        found[row] = {}
        for name, values in over_prompts(each).items():
            interval = bootstrap_interval(values, draws=DRAWS)
            found[row][name] = [interval.low, interval.high]
    return found


def ordering(
    runs: Runs, claims: Sequence[tuple[str, str]], column: str = "style_agreement"
) -> dict[str, dict[str, object]]:
    """For every claim, better row and other row, whether it holds and by how much.

    Returns:
        "better > other" to `holds`, `difference` of the column, and its interval `ci95`; both rows
        drew the same prompts from the same noise, so differences are of pairs.
    """
    found: dict[str, dict[str, object]] = {}
    for better, other in claims:
        apart = over_prompts(runs[better])[column] - over_prompts(runs[other])[column]
        interval = bootstrap_interval(apart, draws=DRAWS)
        found[f"{better} > {other}"] = {
            "holds": interval.value > 0,
            "difference": interval.value,
            "ci95": [interval.low, interval.high],
        }
    return found
