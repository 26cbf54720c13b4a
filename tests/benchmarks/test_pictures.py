"""The grid of the identity table shows what the table judges."""

from benchmarks.identity import rows
from benchmarks.identity.experiment import Experiment
from benchmarks.identity.pictures import SIDE, picture_grid
from benchmarks.identity.rows import HEADLINE, Row
from difflora_core.vision.grid import LABEL_HEIGHT, LARGEST_SIDE


def test_a_grid_shows_the_pictures_that_the_table_judges(artefacts, plan):
    experiment = Experiment(artefacts, plan, "validation", 2)
    features = artefacts.features(experiment.people.photos.images[:, :1])
    row = Row(HEADLINE, rows.predict(artefacts.models["functional"], features))
    sheet = picture_grid(experiment, [row], {HEADLINE: 1.5})
    columns = 2 * len(plan.scenes[:2])
    assert sheet.shape == (4 * (SIDE + LABEL_HEIGHT), columns * SIDE, 3)
    left, top = columns // 2 * SIDE, 4 * (SIDE + LABEL_HEIGHT) - SIDE  # second person, first prompt
    shown = (
        sheet[top : top + SIDE, left : left + SIDE].unflatten(1, (64, -1)).unflatten(0, (64, -1))
    )
    judged = experiment.sampler.pictures(row.weights, 1.5)[:, :2].flatten(0, 1)
    apart = (shown.mean((1, 3)) - judged).abs().mean((1, 2, 3))
    assert int(apart.argmin()) == 2
    assert float(apart.min()) < 0.03


def test_a_table_of_many_rows_is_one_grid_too(artefacts, plan):
    experiment = Experiment(artefacts, plan, "validation", 1)
    features = artefacts.features(experiment.people.photos.images[:, :1])
    row = Row(HEADLINE, rows.predict(artefacts.models["functional"], features))
    sheet = picture_grid(experiment, [row] * 30, {})
    assert LARGEST_SIDE - 33 < sheet.shape[0] <= LARGEST_SIDE
