"""`make bench name=styles args='--quick --json FILE'`: every method that learns a look.

Every row learns the art styles of the demo world's teachers, by distillation (scenarios 1
and 2 of arXiv 2401.13942), from a few pictures, and from a few in a style for each look, with the
same pictures, steps, batches and seeds; then it draws the same prompts from the same noise as the
teacher. Late training is scenario 1 for too long at too high a rate. Base and teacher are the two
ends. What is compared stands in `methods/`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from difflora_core.config import Config
from difflora_core.demo import paths
from difflora_core.demo.world.art_styles import ART_STYLES
from difflora_core.evaluation.report import Report

from ..command import benchmark_console, command_parser, commit, machine, set_threads, write_report
from ..prompts import PROMPTS
from .conclusions import AXES, Columns, Runs, ordering, summary
from .methods import CLAIMS, ROWS, rows_named
from .methods.base import Course, StyleRow
from .pictures import BASE, TEACHER, DrawingPlan, StyleEvaluator
from .tasks import EACH_LOOK, TASKS, TaskKind, TaskSize
from .trainer import StyleTrainer
from .world import StyleWorld, demo_world

DIGITS = {"parameters": 0, "file_kb": 1, "best_step": 0, "seconds": 1, "step_ms": 2}


@dataclass(frozen=True)
class Size(Config):
    """How much is measured.

    `styles`: of art; `seeds`: of training; `few_seeds`: of open options and of late training;
    `course`: of every run; `tasks`: what is learned from; `plan`: pictures to judge; `step_rounds`:
    timed UNet steps.
    """

    styles: tuple[str, ...] = tuple(ART_STYLES)
    seeds: tuple[int, ...] = (0, 1, 2)
    few_seeds: tuple[int, ...] = (0, 1, 2)
    course: Course = field(default_factory=Course)
    tasks: TaskSize = field(default_factory=TaskSize)
    plan: DrawingPlan = field(default_factory=DrawingPlan)
    step_rounds: int = 15


QUICK = Size(
    ("poster",),  # it shows the colours that prompts name; ink veils them
    (0, 1, 2),
    (0,),
    Course(60, 2),
    TaskSize(24, held_out=8),
    DrawingPlan(PROMPTS[::2], people=1, steps=8),
    step_rounds=7,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Styles, learned from teachers and from pictures.", threads=1)
    parser.add_argument("--quick", action="store_true", help="one style, short runs")
    about = "folder with teachers/ and judges/ of make demo-world"
    parser.add_argument("--teachers", type=Path, default=paths.ARTEFACTS, help=about)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="some alone")
    parser.add_argument("--rows", nargs="+", default=["*"], help='rows by name, "LoRA*"')
    parser.add_argument("--seeds", nargs="+", type=int, help="of training, for more than one")
    parser.add_argument("--steps", type=int, help="of every run; late training takes four times")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console, started = benchmark_console(), time.perf_counter()
    size = QUICK if options.quick else Size()
    course = replace(size.course, steps=options.steps or size.course.steps)
    size = replace(size, seeds=tuple(options.seeds or size.seeds), course=course)
    rows = rows_named(options.rows)
    each_look = any(TASKS[task].each_look for task in options.tasks)
    styles = tuple(ART_STYLES) if each_look else size.styles
    world = demo_world(styles, options.teachers, size.plan.people, console.print)
    report = measure(world, size, options.tasks, rows)
    minutes = (time.perf_counter() - started) / 60
    facts = {"quick": options.quick, "minutes": minutes, "machine": machine(), "commit": commit()}
    report = Report(report.rows, {**report.facts, **facts})
    print_results(report, console)
    write_report(report, options.json, console)
    return 0


def measure(
    world: StyleWorld,
    size: Size,
    tasks: Sequence[str] = tuple(TASKS),
    names: Sequence[str] = tuple(ROWS),
) -> Report:
    """Some rows of some tasks, and the conclusions."""
    evaluator = StyleEvaluator(world, size.plan)
    rows: dict[str, dict[str, float]] = {}
    confidence: dict[str, dict[str, list[float]]] = {}
    held: dict[str, object] = {}
    better: dict[str, object] = {}
    for task in tasks:
        runs, costs = learned(world, evaluator, task, size, names)
        for name, columns in summary(runs).items():
            means = {column: found.value for column, found in columns.items()}
            rows[f"{task}: {name}"] = {**means, **costs.get(name, {})}
            ends = {column: [found.low, found.high] for column, found in columns.items()}
            confidence[f"{task}: {name}"] = ends
        held[task] = ordering(runs, CLAIMS)
        options = [(row.name, row.option_of) for row in ROWS.values() if row.option_of]
        better[task] = ordering(runs, options)
    facts = {
        "ci95": confidence,
        "ordering_holds": held,
        "options": better,
        "readers": {style: reader.accuracy for style, reader in world.readers.items()},
        "protocol": {"tasks": list(tasks), **size.to_dict()},
    }
    return Report(rows, facts)


def learned(
    world: StyleWorld, evaluator: StyleEvaluator, task: str, size: Size, names: Sequence[str]
) -> tuple[Runs, dict[str, dict[str, float]]]:
    """Of some rows the columns of their runs on a task, and the means of what they cost.

    Teacher and base, which learn nothing, are among the rows.
    """
    trainer, kind = StyleTrainer(world.cache / "learned", world.log), TASKS[task]
    runs: dict[str, dict[tuple[str, int], Columns]] = {TEACHER: {}, BASE: {}}
    costs: dict[str, list[dict[str, float]]] = {}
    for style in (EACH_LOOK,) if kind.each_look else size.styles:
        given = kind.make(world, style, size.tasks)
        runs[TEACHER][style, 0] = evaluator.teacher(style)
        runs[BASE][style, 0] = evaluator.base(style, given)
        for seed, row in _runs(kind, size, names):
            course = replace(size.course, seed=seed)
            long = row.long(course) if kind.late else (row, course)
            trained = trainer.train(given, *long, last=kind.late)
            runs.setdefault(row.name, {})[style, seed] = evaluator.columns(style, given, trained)
            first = not costs.get(row.name)
            timed = evaluator.step_milliseconds(trained, size.step_rounds) if first else math.nan
            routed = evaluator.routing(given, trained)
            costs.setdefault(row.name, []).append({**trained.costs, "step_ms": timed, **routed})
    means = {
        name: {column: _mean([one[column] for one in each]) for column in each[0]}
        for name, each in costs.items()
    }
    return runs, means


def _runs(kind: TaskKind, size: Size, names: Sequence[str]) -> Iterator[tuple[int, StyleRow]]:
    """Seeds and rows that a task has: seed by seed, so that a table that is stopped is even."""
    chosen = [ROWS[name] for name in names if ROWS[name].late or not kind.late]
    for seed in dict.fromkeys((*size.seeds, *size.few_seeds)):
        for row in chosen:
            few = kind.late or bool(row.option_of)
            if seed in (size.few_seeds if few else size.seeds):
                yield seed, row


def _mean(values: Sequence[float]) -> float:
    """Of what was measured."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known)


def print_results(report: Report, console: Console) -> None:
    """Print the table, which claims hold, and which options are better."""
    console.print(report.to_markdown(DIGITS))
    facts = report.facts
    console.print(f"{facts['machine']}, {facts['commit'][:12]}, {facts['minutes']:.1f} minutes")
    console.print(f"right answers of the readers: {facts['readers']}")
    for task in facts["ordering_holds"]:
        for claim, found in {**facts["ordering_holds"][task], **facts["options"][task]}.items():
            said = ("holds, apart" if found["apart"] else "holds") if found["holds"] else "no"
            console.print(f"{task}, {claim}: {said}; {_differences(found)}")


def _differences(found: Mapping[str, Any]) -> str:
    """How much better the first row of a claim is on each axis, with intervals."""
    words = []
    for axis in AXES:
        low, high = found[axis]["ci95"]
        words.append(f"{axis} {found[axis]['difference']:+.3f} [{low:+.3f}, {high:+.3f}]")
    return ", ".join(words)
