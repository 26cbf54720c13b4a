"""`make bench name=train_baselines args='--quick'`: every baseline, trained once on the same terms.

IP-Adapter, PhotoMaker, InstantID and DiffLoRA's functional preset with its ablations: the same
base, people, pictures, batches, optimiser and steps. `make bench name=identity args='--baselines
quick'` draws with what this wrote. A stopped run goes on; what is trained is not trained again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from difflora_core.config import parse_json
from difflora_core.evaluation.report import Report
from difflora_core.storage.atomic import write_text

from ..command import benchmark_console, command_parser, commit, machine, set_threads, show_report
from .artefacts import load_artefacts
from .baselines.registry import BASELINES
from .baselines.training import (
    BUDGETS,
    JUDGED_PEOPLE,
    METHODS,
    OURS,
    Budget,
    file_of,
    loss_of_base,
    train_baseline,
    train_ours,
    training_set,
)
from .rows import BASE


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Train the baselines of the identity table.")
    parser.add_argument("--budget", choices=BUDGETS, default="full", help="what each method gets")
    parser.add_argument(
        "--quick",
        dest="budget",
        action="store_const",
        const="quick",
        help="minutes for each; all are poor",
    )
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="NAME", help="these methods")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    budget = BUDGETS[options.budget]
    rows = train_all(budget, options.only or METHODS, console)
    facts = {"budget": budget.to_dict(), "commit": commit(), "machine": machine()}
    facts["sources"] = {name: method.source for name, method in BASELINES.items()}
    report = Report(rows, facts)
    show_report(report, options.json, console, {"validation": 4, "seconds": 0, "mb": 1})
    return 0


def train_all(
    budget: Budget, names: Sequence[str], console: Console
) -> dict[str, dict[str, float]]:
    """Train what is not there yet: loss on validation people, seconds and size of each."""
    artefacts, rows = load_artefacts(), {}
    sets = tuple(
        training_set(artefacts.base, split, people)
        for split, people in (("train", budget.people), ("validation", JUDGED_PEOPLE))
    )
    rows[BASE] = {"validation": loss_of_base(artefacts.base, sets[1], budget)}
    for name in names:
        path = file_of(name, budget, artefacts.cache / "baselines", artefacts.base_hash)
        said = path.with_suffix(".json")
        if not path.exists() or not said.exists():
            started = time.perf_counter()
            train = train_ours if name in OURS else train_baseline
            found = train(name, artefacts.base, sets, budget, path, _progress(name, console))
            write_text(said, json.dumps({**found, "seconds": time.perf_counter() - started}))
        rows[name] = {**_read(said), "mb": path.stat().st_size / 1e6}
    return rows


def _progress(name: str, console: Console):
    """Prints every log of a run."""

    def progress(step: int, total: int, metrics: dict[str, float]) -> None:
        line = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        console.print(f"{name}, step {step} of {total}: {line}")

    return progress


def _read(path: Path) -> dict[str, float]:
    return dict(parse_json(path.read_bytes(), path.name))
