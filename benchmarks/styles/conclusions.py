"""Intervals of the rows, and whether the paper's ordering of them holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from difflora_core.evaluation.report import Interval

Columns = Mapping[str, Tensor]
"""Name to a value of every prompt, (P,)."""
Runs = Mapping[str, Mapping[tuple[str, int], Columns]]
"""Row to its runs: of a style by a training seed."""
DRAWS = 2000

PAPER = ("style_agreement", "prompt_agreement")
"""Axes on which the paper orders methods: it has ImageReward and PickScore, and CLIPScore."""
AXES = {"style_agreement": 1, "prompt_agreement": 1, "face": 1, "teacher_distance": -1}
"""Axes that are reported, with the direction that is better."""


def interval(values: Tensor, draws: int = DRAWS) -> Interval:
    """Mean and 95 % percentile bootstrap of (R, P), over runs and prompts both.

    All runs draw the same prompts, so each resample takes runs and prompts apart and crosses them
    (the pigeonhole bootstrap, Owen 2007). One run says nothing of other seeds.
    """
    generator, fine = torch.Generator().manual_seed(0), values.double()
    rows = torch.randint(fine.shape[0], (draws, fine.shape[0], 1), generator=generator)
    columns = torch.randint(fine.shape[1], (draws, 1, fine.shape[1]), generator=generator)
    means = fine[rows, columns].mean((1, 2))
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return Interval(float(fine.mean()), low, high)


def summary(runs: Runs) -> dict[str, dict[str, Interval]]:
    """Row to column to its mean and interval."""
    return {
        row: {
            name: interval(torch.stack([columns[name] for columns in each.values()]))
            for name in next(iter(each.values()))
        }
        for row, each in runs.items()
    }


def ordering(runs: Runs, claims: Sequence[tuple[str, str]]) -> dict[str, dict[str, object]]:
    """For every claim, better row and other row, whether it holds and by how much.

    Returns:
        "better > other" to `holds`, on both of the paper's axes; `apart`, whether their intervals
        say so too; and for each axis the `difference`, positive where the first row is better, with
        its interval `ci95`. Both rows drew the same prompts from the same noise after the same
        batches, so differences are of pairs; claims on rows that are not there are left out.
    """
    found: dict[str, dict[str, object]] = {}
    for better, other in claims:
        shared = [key for key in runs.get(better, {}) if key in runs.get(other, {})]
        if not shared:
            continue
        apart = {}
        for axis, sign in AXES.items():
            pairs = [runs[better][key][axis] - runs[other][key][axis] for key in shared]
            apart[axis] = interval(sign * torch.stack(pairs))
        found[f"{better} > {other}"] = {
            "holds": all(apart[axis].value > 0 for axis in PAPER),
            "apart": all(apart[axis].low > 0 for axis in PAPER),
            **{
                axis: {"difference": one.value, "ci95": [one.low, one.high]}
                for axis, one in apart.items()
            },
        }
    return found
