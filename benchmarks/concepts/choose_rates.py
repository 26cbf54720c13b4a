"""`make bench name=choose_rates`: the learning rates of new words, on validation concepts.

For each method the rates at which its own settings span the largest area of likeness and prompt
agreement. They are then written into its entry in methods.py by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console

from difflora_core.demo.world.concepts import VALIDATION_CONCEPTS
from difflora_core.evaluation.pareto import hypervolume

from ..command import benchmark_console, command_parser, set_threads
from ..prompts import with_plain_things
from .methods import METHODS
from .methods.base import ComparedMethod, TrainingSettings
from .sweep import SCENES, demo_evaluator, goals, means, sweep
from .word_pictures import ConceptEvaluator, evaluation_prompts

NUMBER = 900
"""Of the first concept's prompts, so that no noise is that of the final table."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    about = "Choose learning rates on validation concepts."
    parser = command_parser(about, report=False, threads=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--prompts", type=int, default=10)
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    methods = [METHODS[name] for name in options.methods]
    choose(demo_evaluator(console), methods, options.prompts, console)
    return 0


def choose(
    evaluator: ConceptEvaluator,
    methods: Sequence[ComparedMethod],
    prompts: int,
    console: Console,
    training: TrainingSettings | None = None,
) -> dict[str, tuple[float, ...]]:
    """Best rates of each method.

    Args:
        evaluator: trains, draws and judges.
        methods: entries of METHODS.
        prompts: how many of the benchmark's.
        console: where to print.
        training: everything but the rates.
    """
    training = training or TrainingSettings()
    scenes = SCENES[:: len(SCENES) // prompts][:prompts]
    wanted = {
        c.word: evaluation_prompts([c], with_plain_things(scenes, c.kind), NUMBER + k)
        for k, c in enumerate(VALIDATION_CONCEPTS)
    }
    flat = [prompt for group in wanted.values() for prompt in group]
    base = means(evaluator.judged(evaluator.draw(flat), flat))["concept_similarity"]
    reference, best = torch.tensor([base, 0.0]).double(), {}
    for method in methods:
        areas = {}
        for rates in method.rate_grid:
            own = replace(method, rates=rates)
            trained = evaluator.trainer.train_each(VALIDATION_CONCEPTS, own, training)
            points = goals(sweep(evaluator, own, trained, wanted)).double().mean(1)
            areas[rates] = float(hypervolume(points, reference))
            line = "  ".join(f"{like:.2f}/{agrees:.2f}" for like, agrees in points.tolist())
            console.print(f"{method.name} {rates}: {areas[rates]:.3f}   {line}")
        best[method.name] = max(areas, key=lambda rates: areas[rates])
        console.print(f"{method.name}: {best[method.name]}")
    return best
