"""`make bench name=choose_pairs`: the setting at which a method draws two words in one picture.

For each method the one of its `pair_grid` at which both concepts are recognised most often, on
validation concepts. It is then written into the method's entry by hand.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from difflora_core.demo.world.concepts import VALIDATION_CONCEPTS

from ..command import benchmark_console, command_parser, set_threads
from .methods import METHODS
from .methods.base import TrainingSettings
from .pairs import pair_columns, pair_prompts, shares_of_both
from .sweep import SCENES, demo_evaluator
from .word_pictures import ConceptEvaluator

VALIDATION_PAIRS = ((0, 2), (1, 2), (0, 1), (3, 2), (3, 1))
NUMBER = 950
"""Of the first pair's prompts, so that no noise is that of the final table."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    about = "Choose settings for two words in one picture on validation concepts."
    options = command_parser(about, report=False, threads=1).parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    choose(demo_evaluator(console), len(SCENES), console, TrainingSettings())
    return 0


def choose(
    evaluator: ConceptEvaluator, scenes: int, console: Console, training: TrainingSettings
) -> dict[str, float]:
    """Best pair setting of each method.

    Args:
        evaluator: trains, draws and judges.
        scenes: how many of the benchmark's.
        console: where to print.
        training: what all trainings share.
    """
    pairs = {
        NUMBER + k: (VALIDATION_CONCEPTS[a], VALIDATION_CONCEPTS[b])
        for k, (a, b) in enumerate(VALIDATION_PAIRS)
    }
    wanted, best = [pair_prompts(pairs, SCENES[:scenes], training.seed)], {}
    for name, method in METHODS.items():
        trained = evaluator.trainer.train_each(VALIDATION_CONCEPTS, method, training)
        shares = {}
        for setting in method.pair_grid:
            columns = pair_columns(evaluator, wanted, [trained], setting)
            shares[setting] = float(shares_of_both(columns, wanted).mean())
            like, agrees = columns["concept_similarity"].mean(), columns["prompt_agreement"].mean()
            row = f"both {shares[setting]:.2f}  likeness {like:.2f}  agreement {agrees:.2f}"
            console.print(f"{method.label(setting)}: {row}")
        best[name] = max(shares, key=lambda setting: shares[setting])
        console.print(f"{name}: {best[name]}")
    return best
