"""`make bench name=face_parameters`: which parts of a face each way of drawing a person gets right.

A judge reads the numbers from which a person is drawn, and this table has its mean error for each
of them. Where a row is near the base, it does not draw that part of the person; where every row is,
the base model itself cannot, and where the real pictures are, the judge cannot read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from difflora_core.demo import paths
from difflora_core.demo.world.identities import PARAMETERS
from difflora_core.evaluation.report import Report

from ..command import benchmark_console, command_parser, commit, machine, set_threads, show_report
from .artefacts import load_artefacts
from .choose_strength import read_strengths, validation_plan
from .experiment import Experiment
from .rows import BASE, HEADLINE, DreamBoothRuns, labelled, wanted_row

ROWS = (f"={HEADLINE}", "=paper, 1 photo", "=DreamBooth, 8 photos, 300 steps")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Errors of every number that draws a face, on validation people.")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument(
        "--rows",
        nargs="+",
        default=ROWS,
        metavar="TEXT",
        help="rows whose name contains one of these; =TEXT: is TEXT",
    )
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    artefacts = load_artefacts(log=console.print)
    experiment = Experiment(artefacts, validation_plan(), "validation", options.people)
    errors = errors_of(experiment, read_strengths(paths.STRENGTHS), options.rows)
    report = Report(by_parameter(errors), {"commit": commit(), "machine": machine()})
    show_report(report, options.json, console)
    return 0


def errors_of(
    experiment: Experiment, strengths: Mapping[str, float], wanted: Sequence[str]
) -> dict[str, Tensor]:
    """Name of a row to its errors (P,): real pictures, the base, and the wanted rows.

    Args:
        experiment: the people.
        strengths: row to the strength that it is drawn at.
        wanted: see `rows.wanted_row`.
    """
    shown = {**experiment.real_pictures(), BASE: experiment.sampler.pictures()}
    for row in experiment.rows(DreamBoothRuns().only(wanted), wanted):
        if wanted_row(row.name, wanted):
            strength = row.chosen(strengths)
            pictures = experiment.sampler.pictures(row.weights, strength)
            shown[labelled(row.name, strength)] = pictures
    return {name: experiment.evaluator.parameter_errors(p) for name, p in shown.items()}


def by_parameter(errors: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Rows of the table: every parameter, then the mean of all."""
    rows = {
        parameter: {name: float(each[place]) for name, each in errors.items()}
        for place, parameter in enumerate(PARAMETERS)
    }
    return {**rows, "mean": {name: float(each.mean()) for name, each in errors.items()}}
