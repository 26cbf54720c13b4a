"""Groups against one at a time: everybody trains alike, and the best of the others counts."""

from dataclasses import replace

import pytest
import torch

from benchmarks.identity.corpus_training import COURSE, GROUPED, JUDGED, Job, _facts, _plans


def test_groups_are_measured_against_the_fastest_of_stock_by_clock_and_by_processor():
    rows = {
        GROUPED: {"identities_per_hour": 60.0, "cpu_seconds_per_identity": 2.0},
        "stock peft": {"identities_per_hour": 10.0, "cpu_seconds_per_identity": 9.0},
        "stock peft, float32": {"identities_per_hour": 20.0, "cpu_seconds_per_identity": 10.0},
    }
    facts = _facts(rows, COURSE)
    assert facts["grouped_over_single"] == pytest.approx(3.0)
    assert facts["grouped_over_single_cpu"] == pytest.approx(4.5)
    assert facts["fastest_single"] == "stock peft, float32"


def test_every_way_trains_the_same_people_by_the_same_course():
    people = Job(torch.zeros(8, 2, 8, 4, 4), [["a", "b"]] * 8, tuple(range(8)))
    plans = _plans(COURSE, people, 2)
    for name, (trainer, jobs) in plans.items():
        assert trainer.grouped == (name == GROUPED)
        assert trainer.threads * len(jobs) == 2, name  # all cores, and no more
        assert {*range(JUDGED)} <= {seed for job in jobs for seed in job.seeds}
        assert replace(trainer.config, precision=COURSE.precision) == COURSE
    precisions = [trainer.config.precision for trainer, _ in plans.values()]
    assert precisions == ["bf16", "bf16", "bf16", "no"]
