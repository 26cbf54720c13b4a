"""DreamBooth's settings are compared each at the strength that serves them best."""

from dataclasses import replace

import pytest
import torch

from benchmarks.identity import yardstick
from benchmarks.identity.dreambooth import SETTINGS, DreamBoothTrainer
from benchmarks.identity.experiment import Experiment, Trial


def trial(strength, face, error, agreement):
    columns = {
        "face_similarity": torch.tensor(face),
        "parameter_error": torch.tensor(error),
        "prompt_agreement": torch.tensor(agreement),
        "denoising_loss": torch.tensor([0.1, 0.3]),
    }
    return Trial("any", strength, columns, {"strength": strength})


def test_a_course_is_worth_what_its_best_faithful_strength_is(artefacts, plan, monkeypatch):
    """Both judges count the same; a strength that forgets the prompt is not taken."""
    drawn = {
        0.75: trial(0.75, [0.2, 0.4], [0.4, 0.4], [0.9, 0.9]),
        1.0: trial(1.0, [0.4, 0.6], [0.3, 0.3], [0.88, 0.9]),
        1.25: trial(1.25, [0.8, 0.8], [0.2, 0.2], [0.8, 0.8]),
        1.5: trial(1.5, [0.3, 0.3], [0.5, 0.5], [0.9, 0.9]),
    }
    ends = trial(0.0, [0.0, 0.0], [0.5, 0.5], [0.9, 0.9]), trial(0.0, [1.0, 1.0], [0.1, 0.1], [1.0])
    courses = []

    def train(_, pictures, seeds, course):
        courses.append((course, len(seeds), pictures.images.shape[1]))

    monkeypatch.setattr(DreamBoothTrainer, "train", train)
    monkeypatch.setattr(Experiment, "trial", lambda _, row, strength: drawn[strength])
    experiment = Experiment(artefacts, replace(plan, repeats=0), "validation", 2)
    course = replace(SETTINGS, learning_rate=0.5)
    made = yardstick.course_row(experiment, "any", course, ends)
    assert courses == [(course, 2, 8)]
    assert made["strength"] == 1.0
    assert made["score"] == pytest.approx((0.5 + 0.5) / 2)  # of face and of parameters, half way
    assert made["face_similarity"] == pytest.approx(0.5)
    assert made["denoising_loss"] == pytest.approx(0.2)
    assert made["prompt_agreement"] == pytest.approx(0.89)
