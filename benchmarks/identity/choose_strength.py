"""`make bench name=choose_strength`: the strength of every row, chosen on validation people.

Both judges count the same. A strength at which pictures follow their prompts clearly less than the
base model's do is not chosen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from difflora_core.config import parse_json
from difflora_core.demo import paths
from difflora_core.demo.build.made import list_artefacts
from difflora_core.errors import ConfigError
from difflora_core.storage.atomic import write_text

from ..command import benchmark_console, command_parser, set_threads
from ..prompts import PROMPTS
from .artefacts import load_artefacts
from .baselines.rows import baseline_rows
from .baselines.training import BUDGETS, Budget
from .drawing import Plan
from .experiment import Experiment, Trial, score
from .rows import DreamBoothRuns, wanted_row

GRID = (0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
AGREEMENT_LOSS = 0.03


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Choose strengths on validation people.", report=False)
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="TEXT",
        help="only rows whose name contains one of these; =TEXT: is TEXT",
    )
    parser.add_argument("--baselines", choices=BUDGETS, help="also the rows of these baselines")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    artefacts, plan = load_artefacts(log=console.print), validation_plan(options.prompts)
    experiment = Experiment(artefacts, plan, "validation", options.people)
    chosen = choose(experiment, options.rows, console, baselines=BUDGETS.get(options.baselines))
    others = read_choices(paths.STRENGTHS) if options.rows else {}
    write_strengths(paths.STRENGTHS, others | chosen)
    list_artefacts()
    console.print(f"wrote {paths.STRENGTHS.name}")
    return 0


def validation_plan(prompts: int = 6) -> Plan:
    """What validation people are drawn with: other noise than that of the tables."""
    return Plan(PROMPTS[::3][:prompts], repeats=0, seed=1)


def choose(
    experiment: Experiment,
    wanted: Sequence[str] | None,
    console: Console,
    grid: Sequence[float] = GRID,
    baselines: Budget | None = None,
) -> dict[str, dict[str, object]]:
    """Best strength of each row that has its own, with the score of every strength.

    Args:
        experiment: validation people.
        wanted: only rows whose name contains one of these; None takes all. DreamBooth LoRAs are
            trained only when they are wanted.
        console: where to print.
        grid: strengths.
        baselines: budget of the baselines that are chosen for too.
    """
    base, real = experiment.base(), experiment.real()[0]
    result: dict[str, dict[str, object]] = {}
    rows = experiment.rows(DreamBoothRuns().only(wanted), wanted)
    if baselines is not None:
        rows += baseline_rows(experiment.artefacts, experiment.people, baselines, wanted)
    for row in rows:
        if row.like or not wanted_row(row.name, wanted):
            continue
        trials = experiment.trials([(row, strength) for strength in grid], console)
        best, scores = at_best(trials, base, real)
        kept = {f"{strength:g}": value for strength, value in scores.items()}
        result[row.name] = {"strength": best.strength, "scores": kept}
        line = "  ".join(f"{k:g}: {v:.3f}" for k, v in scores.items())
        console.print(f"{row.name}: strength {best.strength:g}  ({line})")
    return result


def at_best(trials: Sequence[Trial], base: Trial, real: Trial) -> tuple[Trial, dict[float, float]]:
    """Of a row's trials the one at its best strength, see `best_strength`, and all their scores."""
    scores = {trial.strength: score(trial, base, real) for trial in trials}
    best = best_strength(trials, scores, base)
    return next(trial for trial in trials if trial.strength == best), scores


def best_strength(trials: Sequence[Trial], scores: Mapping[float, float], base: Trial) -> float:
    """The best score among the strengths that follow the prompt; of all when none does."""
    floor = float(base.columns["prompt_agreement"].mean()) - AGREEMENT_LOSS
    faithful = [
        trial.strength
        for trial in trials
        if float(trial.columns["prompt_agreement"].mean()) >= floor
    ]
    return max(faithful or list(scores), key=lambda strength: scores[strength])


def write_strengths(path: Path, chosen: Mapping[str, Mapping[str, object]]) -> None:
    """Write the choices beside the artefacts."""
    write_text(path, json.dumps({"split": "validation", "rows": chosen}, indent=1) + "\n")


def read_strengths(path: Path) -> dict[str, float]:
    """Row name to strength; empty when nothing was chosen yet."""
    return {name: float(row["strength"]) for name, row in read_choices(path).items()}


def read_choices(path: Path) -> dict[str, dict[str, Any]]:
    """What `write_strengths` wrote; empty when nothing was chosen yet.

    Raises:
        ConfigError: it is something else.
    """
    if not path.exists():
        return {}
    try:
        rows = parse_json(path.read_bytes(), path.name)["rows"]
        strengths = [row["strength"] for row in rows.values()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path.name} is no file of strengths; choose them again.") from error
    if not all(type(strength) in (int, float) for strength in strengths):
        raise ConfigError(f"{path.name} holds a strength that is no number; choose them again.")
    return dict(rows)
