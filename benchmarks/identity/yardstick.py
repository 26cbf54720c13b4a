"""`make bench name=yardstick args='--people 4'`: settings of the DreamBooth rows.

LoRAs of validation people by several learning rates on several sets of layers, each judged at its
best strength: the yardstick of the main table is the best of these, so that nothing is compared
with a DreamBooth that was trained by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from difflora_core.evaluation.report import Report
from difflora_core.lora.layout import TARGETS
from difflora_core.training.lora.dreambooth import DreamBoothConfig

from ..command import benchmark_console, command_parser, commit, machine, set_threads, show_report
from .artefacts import load_artefacts
from .choose_strength import at_best, validation_plan
from .dreambooth import SETTINGS
from .experiment import Experiment, Trial
from .rows import Row

STRENGTHS = (0.75, 1.0, 1.25, 1.5)
RATES = (1e-2, 1.4e-2, 2e-2)
KEPT = ("strength", "face_similarity", "parameter_error", "prompt_agreement", "denoising_loss")
DIGITS = {"strength": 2, "denoising_loss": 4}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Settings of the DreamBooth rows, chosen on validation people.")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, metavar="RATE")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=(SETTINGS.targets,))
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    artefacts = load_artefacts(log=console.print)
    experiment = Experiment(artefacts, validation_plan(), "validation", options.people)
    ends, rows = (experiment.base(), experiment.real()[0]), {}
    for targets, rate in product(options.targets, options.rates):
        name = f"{targets}, rate {rate:g}"
        course = replace(SETTINGS, targets=targets, learning_rate=rate)
        rows[name] = course_row(experiment, name, course, ends)
        console.print(f"{name}: " + "  ".join(f"{k} {v:.4g}" for k, v in rows[name].items()))
    facts = {
        "people": options.people,
        "steps": SETTINGS.steps,
        "commit": commit(),
        "machine": machine(),
    }
    report = Report(rows, facts)
    show_report(report, options.json, console, DIGITS)
    return 0


def course_row(
    experiment: Experiment, name: str, course: DreamBoothConfig, ends: tuple[Trial, Trial]
) -> dict[str, float]:
    """What LoRAs of all photos are worth at the strength that serves them best.

    `ends`: base and real pictures. `score`: share of the way between them by both judges.
    """
    people, trainer = experiment.people, experiment.artefacts.trainer
    row = Row(name, trainer.train(people.photos, people.seeds, course))
    best, scores = at_best([experiment.trial(row, strength) for strength in STRENGTHS], *ends)
    means = best.means()
    return {column: means[column] for column in KEPT} | {"score": scores[best.strength]}
