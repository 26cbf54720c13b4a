"""What the table says: shares of DreamBooth's gain and of real pictures, and over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from difflora_core.evaluation.report import (
    bootstrap_interval,
    crossed_interval,
    recovered_share,
    share_improved,
)

from .experiment import Trial
from .people import PHOTOS
from .rows import BASE, CONTROLS, HEADLINE, REAL, REAL_VAE, labelled

YARDSTICK = f"DreamBooth, {PHOTOS} photos"
PAPER = ("paper, 1 photo", "paper, 1 photo, sampled")
JUDGES = {
    "face_similarity": ("", "face judge"),
    "parameter_error": ("_parameters", "parameter judge"),
}
"""Column to the ending of its keys, and what it is called."""


def conclusions(trials: Sequence[Trial]) -> dict[str, Any]:
    """Everything that the JSON says beside the rows; None where a row is missing.

    `recovered_share…` of the functional preset and `paper.recovered_share…` of the paper's, by both
    judges; `of_real`: the functional preset's share of real pictures' own similarity, and how many
    times the parameter error of real pictures through the VAE it makes; `copy_paste` by row;
    `seeds`: see `over_seeds`; `ahead`: see `ahead_of`; `control_gaps`.
    """
    base = next(trial for trial in trials if trial.row == BASE)
    copying = {label(t): t.means()["copy_paste"] for t in trials if "copy_paste" in t.columns}
    paper = [trial for name in PAPER if (trial := last(trials, name)) is not None]
    return {
        **shares(last(trials, HEADLINE), trials),
        "paper": shares(paper[0] if paper else None, trials),
        "of_real": of_real(trials),
        "seeds": over_seeds(trials),
        "ahead": ahead_of(trials),
        "control_gaps": control_gaps(trials, base),
        "copy_paste": copying,
    }


def shares(predicted: Trial | None, trials: Sequence[Trial]) -> dict[str, Any]:
    """Recovered share of DreamBooth's gain over the base by both judges, with its interval."""
    base = next(trial for trial in trials if trial.row == BASE)
    result: dict[str, Any] = {}
    for column, (suffix, _) in JUDGES.items():
        result[f"recovered_share{suffix}"] = None
        result[f"recovered_share{suffix}_ci95"] = [None, None]
        better = min if column == "parameter_error" else max
        best = best_dreambooth(trials, column, better)
        if predicted is None or best is None:
            continue
        ours, start = predicted.columns[column], base.columns[column]
        share = recovered_share(ours, start, best.columns[column])
        result[f"recovered_share{suffix}"] = share.value
        result[f"recovered_share{suffix}_ci95"] = [share.low, share.high]
        result[f"improved{suffix}"] = share_improved(ours, start, better is min)
        result[f"yardstick{suffix}"] = label(best)
    return result


def of_real(trials: Sequence[Trial]) -> dict[str, float | None]:
    """The headline row against real pictures: `face` is a share, `parameters` a multiple."""
    ours, real, through = (last(trials, name) for name in (HEADLINE, REAL, REAL_VAE))
    result: dict[str, float | None] = {"face": None, "parameters": None}
    if ours is not None and real is not None:
        result["face"] = _mean(ours, "face_similarity") / _mean(real, "face_similarity")
    if ours is not None and through is not None:
        result["parameters"] = _mean(ours, "parameter_error") / _mean(through, "parameter_error")
    return result


def over_seeds(trials: Sequence[Trial]) -> dict[str, Any]:
    """The headline row over training seeds: `count`, and by judge mean, low and high.

    The interval is over people and seeds; of one seed it is over people alone.
    """
    name, rest = HEADLINE.split(", ", 1)
    others = [
        row
        for row in dict.fromkeys(trial.row for trial in trials)
        if row.startswith(f"{name}, seed ") and row.endswith(f", {rest}")
    ]
    made = [t for row in (HEADLINE, *others) if (t := last(trials, row)) is not None]
    result: dict[str, Any] = {"count": len(made)}
    for column in JUDGES if made else ():
        found = crossed_interval(torch.stack([trial.columns[column] for trial in made]))
        result[column] = [found.value, found.low, found.high]
    return result


def ahead_of(trials: Sequence[Trial]) -> dict[str, dict[str, list[float]]]:
    """By how much the headline row is better than every other row, person by person.

    Row to judge to difference, low and high of its interval over people; above 0 is better.
    """
    ours, result = last(trials, HEADLINE), {}
    others = [trial for trial in trials if trial.row not in (HEADLINE, REAL, REAL_VAE)]
    for trial in others if ours is not None else ():
        result[label(trial)] = {}
        for column in JUDGES:
            more = ours.columns[column] - trial.columns[column]
            found = bootstrap_interval(-more if column == "parameter_error" else more)
            result[label(trial)][column] = [found.value, found.low, found.high]
    return result


def sentences(facts: Mapping[str, Any]) -> Iterator[str]:
    """The conclusions in words."""
    for name, found in (("functional", facts), ("paper", facts["paper"])):
        if found["recovered_share"] is None:
            yield f"recovered share, {name}: not known without its model and DreamBooth"
            continue
        parts = []
        for suffix, judge in JUDGES.values():
            low, high = found[f"recovered_share{suffix}_ci95"]
            parts.append(
                f"{found[f'recovered_share{suffix}']:.2f} [{low:.2f}, {high:.2f}] by the {judge} "
                f"(against {found[f'yardstick{suffix}']}; {found[f'improved{suffix}']:.0%} improve)"
            )
        yield f"recovered share, {name}: {'; '.join(parts)}"
    real = facts["of_real"]
    if real["face"] is not None:
        yield (
            f"of real pictures: {real['face']:.3f} of their own face similarity, "
            f"{real['parameters']:.2f} times their parameter error through the VAE"
        )
    seeds = facts["seeds"]
    for column in JUDGES if seeds["count"] else ():
        value, low, high = seeds[column]
        yield f"{HEADLINE}, {column}, {seeds['count']} seeds: {value:.3f} [{low:.3f}, {high:.3f}]"
    for row, found in facts["ahead"].items():
        parts = [
            "{:+.3f} [{:+.3f}, {:+.3f}] by the {}".format(*found[column], judge)
            for column, (_, judge) in JUDGES.items()
        ]
        yield f"{HEADLINE}, above 0 where better than {row}: {'; '.join(parts)}"


def label(trial: Trial) -> str:
    """Row name in the table."""
    return labelled(trial.row, trial.strength)


def last(trials: Sequence[Trial], row: str) -> Trial | None:
    """A row at its chosen strength: the last of its trials."""
    found = [trial for trial in trials if trial.row == row]
    return found[-1] if found else None


def best_dreambooth(trials: Sequence[Trial], column: str, choose) -> Trial | None:
    """The best DreamBooth row from all photos, at its chosen strength, by one judge."""
    names = dict.fromkeys(trial.row for trial in trials if trial.row.startswith(YARDSTICK))
    rows = [last(trials, name) for name in names]
    return choose(rows, key=lambda trial: _mean(trial, column)) if rows else None


def control_gaps(trials: Sequence[Trial], base: Trial) -> dict[str, float]:
    """Face similarity of each control minus the base's; should stay within 0.1."""
    start = base.means()["face_similarity"]
    return {
        label(trial): trial.means()["face_similarity"] - start
        for trial in trials
        if trial.row in CONTROLS
    }


def _mean(trial: Trial, column: str) -> float:
    return float(trial.columns[column].mean())
