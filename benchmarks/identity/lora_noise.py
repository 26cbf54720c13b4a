"""`make bench name=lora_noise args='--people 4'`: how much of a trained LoRA is the person.

Everybody is trained three times over one `down`: twice on the same pictures with other noise, and
once on other pictures. What the LoRAs of two people differ in falls into what all trainings of a
person have in common, what only those on the same pictures have, and the rest, which is chance. An
autoencoder and a network that predicts LoRAs can learn the first part alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from difflora_core.demo.build.stages_lora import CORPUS, PAPER_COURSE
from difflora_core.demo.world.renderer import LOOKS
from difflora_core.evaluation.report import Report
from difflora_core.lora.tokens import TokenGrid
from difflora_core.lora.weights import LoRAWeights
from difflora_core.training.lora.dreambooth import DreamBoothConfig

from ..command import benchmark_console, command_parser, commit, machine, set_threads, show_report
from .artefacts import load_artefacts
from .choose_strength import at_best
from .experiment import Experiment, Trial
from .identity import QUICK_PLAN
from .people import render_people
from .rows import Row

PICTURES = 10
OTHER_DRAWS = 10**6
"""Added to everybody's seed where the draws of noise and pictures are others."""
STRENGTHS = (1.0, 1.5, 2.0)
COURSES = {
    "Adam, rate 0.02": CORPUS.dreambooth,
    "Adam, rate 0.005": replace(CORPUS.dreambooth, learning_rate=0.005),
    "eps 0.1, rate 0.3": replace(PAPER_COURSE, learning_rate=0.3),
    "eps 0.1, rate 0.12": PAPER_COURSE,
}
DIGITS = {"strength": 1, "norm": 1, "denoising_loss": 4}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("How much of a trained LoRA is the person, and how much is chance.")
    parser.add_argument("--people", type=int, default=16, help="of the split validation")
    parser.add_argument("--only", nargs="+", choices=COURSES, metavar="NAME", help="these courses")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    plan = replace(QUICK_PLAN, repeats=0, seed=1)
    artefacts = load_artefacts(log=console.print)
    if artefacts.linear is None:
        console.print("It needs the `down` of the corpus: make bench name=fit_linear.")
        return 1
    experiment = Experiment(artefacts, plan, "validation", options.people)
    ends, rows = (experiment.base(), experiment.real()[0]), {}
    for name in options.only or COURSES:
        rows[name] = course_row(experiment, name, COURSES[name], ends)
        console.print(f"{name}: " + "  ".join(f"{k} {v:.4g}" for k, v in rows[name].items()))
    facts = {
        "people": options.people,
        "pictures": PICTURES,
        "commit": commit(),
        "machine": machine(),
    }
    report = Report(rows, facts)
    show_report(report, options.json, console, DIGITS)
    return 0


def course_row(
    experiment: Experiment, name: str, course: DreamBoothConfig, ends: tuple[Trial, Trial]
) -> dict[str, float]:
    """Parts of the variation, and what the first LoRAs of everybody are worth at their best.

    `ends`: base and real pictures.
    """
    made, grid = trainings(experiment, course), TokenGrid(experiment.artefacts.layout, ("up",))
    parts = variation(*(grid.encode(weights)[0].flatten(1).double() for weights in made))
    trials = [experiment.trial(Row(name, made[0]), strength) for strength in STRENGTHS]
    means = at_best(trials, *ends)[0].means()
    kept = ("strength", "face_similarity", "parameter_error", "prompt_agreement")
    loss = trials[0].means()["denoising_loss"]  # at strength 1, where it was trained
    return {**parts, "denoising_loss": loss, **{column: means[column] for column in kept}}


def trainings(experiment: Experiment, course: DreamBoothConfig) -> list[LoRAWeights]:
    """LoRAs of everybody: of some pictures, of the same with other draws, and of other pictures."""
    people, trainer = experiment.people, experiment.artefacts.trainer
    sets = [
        render_people(people.seeds, range(start, start + PICTURES), LOOKS)
        for start in (400, 400 + PICTURES)
    ]
    other = [seed + OTHER_DRAWS for seed in people.seeds]
    runs = ((sets[0], people.seeds), (sets[0], other), (sets[1], other))
    return [trainer.train(pictures, seeds, course) for pictures, seeds in runs]


def variation(first: Tensor, again: Tensor, others: Tensor) -> dict[str, float]:
    """Parts of what people's LoRAs over one `down`, (I, P), differ in; they add up to 1.

    Args:
        first: trained on some pictures.
        again: on the same ones with other draws.
        others: on other pictures.

    Returns:
        `person`, `pictures` and `chance`, and `norm`, the length of a LoRA.
    """
    centred = [rows - rows.mean(0) for rows in (first, again, others)]
    whole = sum(float(rows.square().sum()) for rows in centred) / len(centred)
    same = float((centred[0] * centred[1]).sum()) / whole
    crossed = sum(float((rows * centred[2]).sum()) for rows in centred[:2]) / 2 / whole
    norm = float(first.norm(dim=1).mean())
    return {"person": crossed, "pictures": same - crossed, "chance": 1 - same, "norm": norm}
