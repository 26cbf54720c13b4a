"""`make bench name=identity args='--quick --json FILE --split validation'`: the main table.

The protocol of the DiffLoRA paper at demo scale: 25 people that no trained part has met, 30
prompts, the same noise for every row; --quick takes 5 people and 6 prompts. Every LoRA row stands
at strength 1 and at the strength that validation people chose (choose_strength.py).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from difflora_core.demo import paths
from difflora_core.evaluation.report import Report
from difflora_core.storage.image_files import write_image

from ..command import benchmark_console, command_parser, commit, machine, set_threads, write_report
from ..prompts import PROMPTS, QUICK
from .artefacts import load_artefacts
from .baselines.rows import baseline_rows
from .baselines.training import BUDGETS, Budget
from .choose_strength import read_strengths
from .conclusions import conclusions, label, sentences
from .drawing import Plan
from .experiment import Experiment, Trial
from .measure import COLUMNS
from .pictures import picture_grid
from .rows import DreamBoothRuns, Row, wanted_row

FULL_PLAN = Plan(PROMPTS, repeats=6, noises=4)
QUICK_PLAN = Plan(QUICK, repeats=1, noises=2)
QUICK_RUNS = DreamBoothRuns(one_photo=(), all_photos=(300,))
PEOPLE, QUICK_PEOPLE = 25, 5
DIGITS = {"strength": 2, "denoising_loss": 4, "kid": 4, "step_ms": 1, "file_kb": 0, "model_mb": 1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = parse(arguments)
    set_threads(options.threads)
    console, started = benchmark_console(), time.perf_counter()
    models = dict(pair.split("=", 1) for pair in options.model)
    artefacts = load_artefacts({name: Path(path) for name, path in models.items()}, console.print)
    plan = plan_of(options)
    experiment = Experiment(
        artefacts, plan, options.split, QUICK_PEOPLE if options.quick else PEOPLE
    )
    if options.quick:
        console.print("left out: DreamBooth from 1 photo, and from 8 photos at 100 steps")
    strengths = read_strengths(paths.STRENGTHS)
    if not strengths:
        console.print("no strengths chosen yet: run make bench name=choose_strength")
    runs = QUICK_RUNS if options.quick else DreamBoothRuns()
    runs = runs.only(options.rows)
    budget = BUDGETS.get(options.baselines)
    rows = rows_of(experiment, runs, options.rows, budget)
    trials = run(experiment, rows, strengths, console, options.chosen)
    minutes = (time.perf_counter() - started) / 60
    facts = {"split": options.split, "quick": options.quick, "minutes": minutes}
    report = make_report(trials, experiment, facts)
    print_results(report, console)
    write_report(report, options.json, console)
    if options.pictures:
        write_image(picture_grid(experiment, rows, strengths), options.pictures)
        console.print(f"wrote {options.pictures}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command."""
    parser = command_parser(
        "Likeness of predicted LoRAs, judged on people that no trained part has met."
    )
    parser.add_argument("--quick", action="store_true", help="5 people, 6 prompts, 4 minutes")
    parser.add_argument(
        "--split",
        choices=("validation", "test"),
        default="test",
        help="test people are for the final table alone",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a further DiffLoRA model as rows of its own (ablations); one that is called "
        "'functional, seed N' counts for the interval over seeds",
    )
    parser.add_argument(
        "--baselines",
        choices=BUDGETS,
        help="also rows of other papers' methods, as make bench name=train_baselines trained them",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="TEXT",
        help="only rows whose name contains one of these; =TEXT: is TEXT",
    )
    parser.add_argument(
        "--chosen", action="store_true", help="rows at their chosen strengths alone, not at 1 too"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=QUICK_PLAN.guidance,
        metavar="SCALE",
        help="draw every row under classifier-free guidance, as artists do; strengths stay those "
        "that were chosen without",
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FILE", help="also some pictures of every row"
    )
    return parser.parse_args(arguments)


def plan_of(options: argparse.Namespace) -> Plan:
    """What is drawn of everybody."""
    return replace(QUICK_PLAN if options.quick else FULL_PLAN, guidance=options.guidance)


def rows_of(
    experiment: Experiment,
    runs: DreamBoothRuns,
    only: Sequence[str] | None = None,
    baselines: Budget | None = None,
) -> list[Row]:
    """Every row, or `only` some."""
    rows = [row for row in experiment.rows(runs, only) if wanted_row(row.name, only)]
    if baselines is not None:
        rows += baseline_rows(experiment.artefacts, experiment.people, baselines, only)
    return rows


def run(
    experiment: Experiment,
    rows: Sequence[Row],
    strengths: Mapping[str, float],
    console: Console,
    chosen: bool = False,
) -> list[Trial]:
    """Real pictures, base, and every row at its strengths, see `strengths_of`."""
    wanted = [(row, strength) for row in rows for strength in strengths_of(row, strengths, chosen)]
    return [*experiment.real(), experiment.base(), *experiment.trials(wanted, console)]


def strengths_of(row: Row, strengths: Mapping[str, float], chosen: bool = False) -> list[float]:
    """1 and the chosen strength, once when they are equal; or the `chosen` one alone."""
    own = row.chosen(strengths)
    return [own] if chosen else list(dict.fromkeys([1.0, own]))


def make_report(
    trials: Sequence[Trial], experiment: Experiment, facts: Mapping[str, object]
) -> Report:
    """The table and its conclusions."""
    rows = {}
    for trial in trials:
        means = trial.means()
        rows[label(trial)] = {name: means[name] for name in COLUMNS if name in means}
    people = {
        label(trial): {name: v.tolist() for name, v in trial.columns.items() if v.ndim}
        for trial in trials
    }
    plan = experiment.plan
    protocol = {
        "people": len(experiment.people),
        "prompts": len(plan.scenes),
        "steps": plan.steps,
        "guidance": plan.guidance,
        "noises_per_unseen_picture": plan.noises,
        "pictures_of_fid_and_kid": len(experiment.people) * len(plan.scenes),
    }
    everything = {
        **conclusions(trials),
        "seed": plan.seed,
        "commit": commit(),
        "machine": machine(),
        "protocol": protocol,
        **facts,
        "per_identity": people,
    }
    return Report(rows, everything)


def print_results(report: Report, console: Console) -> None:
    """Print the table and, as the last line, the recovered share."""
    console.print(report.to_markdown(DIGITS))
    facts = report.facts
    gaps = "  ".join(f"{name} {gap:+.3f}" for name, gap in facts["control_gaps"].items())
    console.print(f"controls minus base, face similarity: {gaps}")
    console.print(f"{facts['machine']}, {facts['commit'][:12]}, {facts['minutes']:.1f} minutes")
    for line in sentences(facts):
        console.print(line)
