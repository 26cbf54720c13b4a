"""The errors of single parts of a face are the parameter error of the main table, split."""

import pytest
import torch

from benchmarks.identity.experiment import Experiment
from benchmarks.identity.face_parameters import by_parameter, errors_of
from difflora_core.demo.world.identities import PARAMETERS


@pytest.fixture
def experiment(artefacts, plan):
    return Experiment(artefacts, plan, "validation", 2)


def test_their_mean_is_that_of_the_main_table(experiment):
    errors = errors_of(experiment, {"functional, 1 photo": 1.5}, ["=functional, 1 photo"])
    names = ["real pictures", "real pictures through the VAE", "base", "functional, 1 photo x 1.5"]
    assert list(errors) == names
    rows = by_parameter(errors)
    assert list(rows) == [*PARAMETERS, "mean"]
    trials = [*experiment.real(), experiment.base()]
    for name, trial in zip(names, trials, strict=False):
        assert rows["mean"][name] == pytest.approx(trial.means()["parameter_error"], abs=1e-6)
    assert rows["mean"][names[3]] != rows["mean"]["base"]


def test_an_error_stands_in_the_row_of_its_part(experiment, monkeypatch):
    """A judge that reads the truth, but for one number which it reads half too high."""
    truth = experiment.people.parameters
    wrong = PARAMETERS.index("hair_curl")

    def read(_, images):
        said = truth.repeat_interleave(len(images) // len(truth), 0).clone()
        said[:, wrong] += 0.5
        return said

    monkeypatch.setattr(type(experiment.artefacts.judges), "parameters", read)
    real = experiment.people.prompted.images
    rows = by_parameter({"real": experiment.evaluator.parameter_errors(real)})
    assert rows["hair_curl"]["real"] == pytest.approx(0.5)
    assert rows["jaw"]["real"] == pytest.approx(0.0, abs=1e-6)
    assert rows["mean"]["real"] == pytest.approx(0.5 / len(PARAMETERS))
    assert torch.equal(truth, experiment.people.parameters)
