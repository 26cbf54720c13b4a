"""`make bench name=choose_rates`: the learning rates of taught words, on validation concepts.

For each method the rates at which its own knob spans the largest area of likeness and obedience.
They are then written into `words.RATES` by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from rich.console import Console

from difflora_core.demo.world.concepts import VALIDATION_CONCEPTS
from difflora_core.evaluation.pareto import hypervolume

from ..command import benchmark_console, command_parser, set_threads
from ..prompts import with_plain_things
from .perfusion import SCENES, gallery, goals, means, sweep
from .word_pictures import Gallery, wishes
from .words import DREAMBOOTH, INFUSION, INVERSION, METHODS, PERFUSION, Recipes

GRID: Mapping[str, tuple[tuple[float, ...], ...]] = {
    PERFUSION: ((0.03, 0.001), (0.1, 0.001), (0.3, 0.001), (0.1, 0.006)),
    INFUSION: ((0.03,), (0.1,), (0.3,), (1.0,)),
    DREAMBOOTH: ((0.001,), (0.003,), (0.01,)),
    INVERSION: ((0.003,), (0.01,), (0.03,)),
}
NUMBER = 900
"""Of the first wish, so that no noise is that of the final table."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser(
        "Choose learning rates on validation concepts.", report=False, threads=1
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--prompts", type=int, default=10)
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    choose(gallery(console), options.methods, options.prompts, console)
    return 0


def choose(
    gallery: Gallery,
    methods: Sequence[str],
    prompts: int,
    console: Console,
    recipes: Recipes | None = None,
) -> dict[str, tuple[float, ...]]:
    """Best rates of each method.

    Args:
        gallery: draws and judges.
        methods: of `words.METHODS`.
        prompts: how many of the benchmark's.
        console: where to tell.
        recipes: everything but the rates.
    """
    recipes = recipes or Recipes()
    scenes = SCENES[:: len(SCENES) // prompts][:prompts]
    wanted = {
        c.word: wishes([c], with_plain_things(scenes, c.kind), NUMBER + k)
        for k, c in enumerate(VALIDATION_CONCEPTS)
    }
    flat = [wish for group in wanted.values() for wish in group]
    base = means(gallery.judged(gallery.draw(flat), flat))["concept_similarity"]
    reference, best = torch.tensor([base, 0.0]).double(), {}
    for method in methods:
        areas = {}
        for rates in GRID[method]:
            own = recipes.with_rates(method, rates)
            taught = {c.word: gallery.school.teach(c, method, own) for c in VALIDATION_CONCEPTS}
            points = goals(sweep(gallery, taught, wanted)).double().mean(1)
            areas[rates] = float(hypervolume(points, reference))
            told = "  ".join(f"{like:.2f}/{obey:.2f}" for like, obey in points.tolist())
            console.print(f"{method} {rates}: {areas[rates]:.3f}   {told}")
        best[method] = max(areas, key=lambda rates: areas[rates])
        console.print(f"{method}: {best[method]}")
    return best
