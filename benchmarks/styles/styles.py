"""`make bench name=styles args='--quick --json FILE'`: every method that learns a look.

Every row learns the art styles of the demo world's teachers, by distillation (scenarios 1
and 2 of arXiv 2401.13942) and from a few pictures, with the same pictures, steps, batches and
seeds; then it draws the same prompts from the same noise as the teacher. Base and teacher are the
two ends. What is compared stands in `methods/`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from difflora_core.config import Config
from difflora_core.demo import paths
from difflora_core.demo.world.art_styles import ART_STYLES
from difflora_core.evaluation.report import Report

from ..command import benchmark_console, command_parser, commit, machine, set_threads, write_report
from ..prompts import QUICK as QUICK_SCENES
from .conclusions import intervals, ordering, over_prompts
from .methods import CLAIMS, ROWS
from .methods.base import Course
from .pictures import Columns, DrawingPlan, StyleEvaluator
from .tasks import TASKS, TaskSize
from .trainer import StyleTrainer
from .world import StyleWorld, demo_world

BASE, TEACHER = "base", "teacher"
DIGITS = {"parameters": 0, "file_kb": 1, "best_step": 0, "seconds": 1, "step_ms": 2}


@dataclass(frozen=True)
class Size(Config):
    """How much is measured.

    `styles`: of art; `seeds`: of training; `course`: of every run; `tasks`: what is learned from;
    `plan`: pictures to judge; `step_rounds`: timed UNet steps.
    """

    styles: tuple[str, ...] = tuple(ART_STYLES)
    seeds: tuple[int, ...] = (0, 1, 2)
    course: Course = field(default_factory=Course)
    tasks: TaskSize = field(default_factory=TaskSize)
    plan: DrawingPlan = field(default_factory=DrawingPlan)
    step_rounds: int = 15


QUICK = Size(
    ("ink",),
    (0,),
    Course(60, 2),
    TaskSize(24, held_out=8),
    DrawingPlan(QUICK_SCENES, people=1),
    step_rounds=7,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Styles, learned from teachers and from pictures.", threads=1)
    parser.add_argument("--quick", action="store_true", help="a small table, 13 minutes on a core")
    about = "folder with teachers/ and judges/ of make demo-world"
    parser.add_argument("--teachers", type=Path, default=paths.ARTEFACTS, help=about)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="some alone")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console, started = benchmark_console(), time.perf_counter()
    size = QUICK if options.quick else Size()
    world = demo_world(size.styles, options.teachers, size.plan.people, console.print)
    report = measure(world, size, options.tasks)
    minutes = (time.perf_counter() - started) / 60
    facts = {"quick": options.quick, "minutes": minutes, "machine": machine(), "commit": commit()}
    report = Report(report.rows, {**report.facts, **facts})
    print_results(report, console)
    write_report(report, options.json, console)
    return 0


def measure(world: StyleWorld, size: Size, tasks: Sequence[str] = tuple(TASKS)) -> Report:
    """All rows and conclusions of some tasks."""
    evaluator = StyleEvaluator(world, size.plan)
    end = {TEACHER: [evaluator.teacher(style) for style in size.styles]}
    rows, confidence = _means(end), intervals(end)
    held: dict[str, object] = {}
    for task in tasks:
        runs, costs = learned(world, evaluator, task, size)
        for name, row in _means(runs).items():
            rows[f"{task}: {name}"] = {**row, **costs.get(name, {})}
        confidence |= {f"{task}: {name}": found for name, found in intervals(runs).items()}
        held[task] = ordering(runs, CLAIMS)
    protocol = {"tasks": list(tasks), **size.to_dict()}
    return Report(rows, {"ci95": confidence, "ordering_holds": held, "protocol": protocol})


def learned(
    world: StyleWorld, evaluator: StyleEvaluator, task: str, size: Size
) -> tuple[dict[str, list[Columns]], dict[str, dict[str, float]]]:
    """Of every row the columns of its runs on a task, and the means of what they cost.

    The base, which learns nothing, is among the rows.
    """
    trainer = StyleTrainer(world.cache / "learned", world.log)
    runs: dict[str, list[Columns]] = {name: [] for name in (BASE, *ROWS)}
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
    for style in size.styles:
        given = TASKS[task](world, style, size.tasks)
        runs[BASE].append(evaluator.base(style, given))
        for seed in size.seeds:
            for name, row in ROWS.items():
                trained = trainer.train(given, row, replace(size.course, seed=seed))
                runs[name].append(evaluator.columns(style, given, trained))
                step_ms = evaluator.step_milliseconds(trained, size.step_rounds)
                costs[name].append({**trained.costs, "step_ms": step_ms})
    means = {
        name: {column: sum(one[column] for one in each) / len(each) for column in each[0]}
        for name, each in costs.items()
    }
    return runs, means


def _means(runs: dict[str, list[Columns]]) -> dict[str, dict[str, float]]:
    """Row to column to its mean over runs and prompts."""
    return {
        name: {column: float(values.mean()) for column, values in over_prompts(each).items()}
        for name, each in runs.items()
    }


def print_results(report: Report, console: Console) -> None:
    """Print the table and which claims hold."""
    console.print(report.to_markdown(DIGITS))
    facts = report.facts
    console.print(f"{facts['machine']}, {facts['commit'][:12]}, {facts['minutes']:.1f} minutes")
    for task, claims in facts["ordering_holds"].items():
        for claim, found in claims.items():
            low, high = found["ci95"]
            line = f"{found['holds']} ({found['difference']:+.3f} [{low:+.3f}, {high:+.3f}])"
            console.print(f"{task}, {claim}: {line}")
