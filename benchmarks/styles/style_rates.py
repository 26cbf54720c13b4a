"""`make bench name=style_rates args='--quick'`: learning rates of every row, on held-out pictures.

Every row learns from a teacher (scenario 1) at each of its rates; what counts is the lowest loss on
pictures of prompts that it does not learn from. The best is then written into its file in
`methods/` by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from difflora_core.demo import paths

from ..command import benchmark_console, command_parser, set_threads
from .methods import ROWS, rows_named
from .methods.base import Course
from .styles import QUICK, Size
from .tasks import TaskSize, scenario_1
from .trainer import StyleTrainer
from .world import StyleWorld, demo_world


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    about = "Choose learning rates of styles on held-out pictures."
    parser = command_parser(about, report=False, threads=1)
    parser.add_argument("--quick", action="store_true", help="as many steps as --quick of styles")
    parser.add_argument("--style", default=QUICK.styles[0], help="whose teacher is learned from")
    parser.add_argument("--teachers", type=Path, default=paths.ARTEFACTS, help="see styles")
    parser.add_argument("--rows", nargs="+", default=["*"], help='rows by name, "LoRA*"')
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console, size = benchmark_console(), QUICK if options.quick else Size()
    rows = rows_named(options.rows)
    world = demo_world([options.style], options.teachers, 1, console.print)
    choose(world, options.style, rows, size.course, size.tasks, console)
    return 0


def choose(
    world: StyleWorld,
    style: str,
    rows: Sequence[str],
    course: Course,
    size: TaskSize,
    console: Console,
) -> dict[str, float]:
    """Best rate of each row.

    Args:
        world: models.
        style: of the teacher.
        rows: names of ROWS.
        course: of every run.
        size: of the task.
        console: where to print.
    """
    given, best = scenario_1(world, style, size), {}
    trainer = StyleTrainer(world.cache / "learned")
    for name in rows:
        row, losses = ROWS[name], {}
        for rate in row.rates:
            facts = trainer.train(given, row.with_rate(rate), course).adaptation.facts
            losses[rate] = float(facts["loss"])
            late, step = facts["late"], facts["steps"]
            console.print(f"{name}, {rate:g}: {losses[rate]:.5f} at {step}, late x {late:.2f}")
        best[name] = min(losses, key=lambda rate: losses[rate])
        console.print(f"{name}: {best[name]:g}")
    return best
