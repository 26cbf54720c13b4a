"""The table of styles on a tiny random world: from pictures to the JSON, and its sums."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.prompts import QUICK
from benchmarks.styles.conclusions import ordering
from benchmarks.styles.methods import CLAIMS, ROWS
from benchmarks.styles.methods.base import Course
from benchmarks.styles.methods.deft import DEFT
from benchmarks.styles.methods.lora import EQUAL, TIMES_4, TIMES_16
from benchmarks.styles.methods.styleinject import FOUR, STA
from benchmarks.styles.people import KnownPeople
from benchmarks.styles.pictures import DrawingPlan
from benchmarks.styles.styles import BASE, TEACHER, Size, main, measure
from benchmarks.styles.tasks import TASKS, TaskSize
from benchmarks.styles.trainer import StyleTrainer
from benchmarks.styles.world import StyleWorld
from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.demo import paths
from difflora_core.demo.networks.base import load_base
from difflora_core.demo.networks.chinese import ChineseText, translate
from difflora_core.demo.networks.concept_text import chinese_text
from difflora_core.demo.networks.style_judge import StyleJudge
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.models.layers import DrawnFrom
from difflora_core.training.picture_task import PictureTask

TINY = Size(
    ("ink",),
    (0,),
    Course(steps=2, batch=1),
    TaskSize(prompts=2, shots=1, held_out=1, sampling_steps=2),
    DrawingPlan(QUICK[:2], noises=2, steps=2),
    step_rounds=1,
)
JUDGED = {"style_agreement", "teacher_distance", "prompt_agreement", "diversity", "face"}
COSTS = {"parameters", "file_kb", "best_step", "late_loss", "seconds", "step_ms"}


def random_teacher(base):
    """The base with other weights."""
    unet = UNet2DConditionModel.from_config(base.unet.config)
    unet.load_state_dict(base.unet.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    unet.requires_grad_(False).eval()
    return DiffusersBase(unet, base.vae, base.encode_prompts, base.scheduler)


def known_people(artefacts):
    """Two people with random LoRAs."""
    generator, layers = torch.Generator().manual_seed(3), {}
    for shape in artefacts.layout:
        down = torch.randn(2, 2, shape.in_features, generator=generator)
        up = 0.02 * torch.randn(2, shape.out_features, 2, generator=generator)
        layers[shape.name] = LoRALayer(down, up, 2.0)
    return KnownPeople(LoRAWeights(layers), torch.randn(2, 96, generator=generator))


@pytest.fixture(scope="module")
def world(artefacts, text, tmp_path_factory):
    base, generator = artefacts.base, torch.Generator().manual_seed(2)
    judge = StyleJudge(("plain", "ink"), torch.randn(19, 2, generator=generator), torch.zeros(2))
    student, teacher = (PictureTask(b, text, "demo") for b in (base, random_teacher(base)))
    with DrawnFrom(torch.Generator().manual_seed(9)):
        reads = chinese_text(ChineseText().requires_grad_(False).eval())
    cache = tmp_path_factory.mktemp("styles")
    chinese = PictureTask(base, reads, "demo")
    people = known_people(artefacts)
    return StyleWorld(student, chinese, {"ink": teacher}, judge, artefacts.judges, people, cache)


@pytest.fixture(scope="module")
def report(world):
    return measure(world, TINY)


def test_every_row_and_conclusion_is_there(report):
    assert set(report.rows[TEACHER]) == JUDGED
    for task in TASKS:
        assert set(report.rows[f"{task}: {BASE}"]) == JUDGED
        for name in ROWS:
            assert set(report.rows[f"{task}: {name}"]) == JUDGED | COSTS
            # the best state is the lowest on held-out pictures, so the last one is no lower
            assert report.rows[f"{task}: {name}"]["late_loss"] >= 1 - 1e-6
    assert len(report.rows) == 1 + len(TASKS) * (1 + len(ROWS))
    written = json.loads(report.to_json())
    for name, row in written["rows"].items():
        for column in JUDGED:
            low, high = written["ci95"][name][column]
            assert low - 1e-6 <= row[column] <= high + 1e-6
    for held in written["ordering_holds"].values():
        assert set(held) == {f"{better} > {other}" for better, other in CLAIMS}


def test_the_teacher_is_its_own_pattern(report):
    assert report.rows[TEACHER]["teacher_distance"] == 0
    assert report.rows[f"scenario 1: {BASE}"]["teacher_distance"] > 0.01


def test_every_row_changes_the_pictures(report):
    """Two steps at these rates move every method, in every task, to a place of its own."""
    bare = f"few shots: {BASE}"  # the student of scenario 1
    distances = {n: row["teacher_distance"] for n, row in report.rows.items() if n != bare}
    assert len(set(distances.values())) == len(distances)


def test_a_second_table_takes_everything_from_disk(report, world, monkeypatch):
    monkeypatch.setattr("benchmarks.styles.trainer.run_adaptation", None)
    again = measure(world, TINY)
    for name, row in again.rows.items():
        assert set(row) == set(report.rows[name])
        kept = {k: v for k, v in row.items() if k != "step_ms"}  # which is measured anew
        assert kept == {k: report.rows[name][k] for k in kept}
    assert again.facts == report.facts


def test_the_teacher_is_told_in_its_own_language_what_the_student_is(world):
    given = TASKS["scenario 2"](world, "ink", TINY.tasks)
    pairs = [*given.examples.prompts, *given.held_out.prompts]
    for (prompt,) in pairs:
        assert translate(given.task.spoken[prompt]) == prompt != given.task.spoken[prompt]
        assert world.chinese.text.special.unknown not in world.chinese.text.tokens(prompt)
    assert given.task.loss.features == 0  # the languages differ, so outputs alone are compared


def test_sta_alone_is_a_spread_and_nothing_else(world, tmp_path):
    task = TASKS["scenario 1"](world, "ink", TINY.tasks)
    trained = StyleTrainer(tmp_path).train(task, ROWS[STA], TINY.course)
    layers = trained.adaptation.layers.values()
    assert not any(bool(layer["up"].any()) for layer in layers)
    assert all(bool(layer["spread_bias"].any()) for layer in layers)


def test_all_rows_learn_from_the_same_batches(world):
    """What a row is given does not depend on it: its course is that of all others."""
    course = Course(steps=7, batch=3, seed=4)
    courses = {repr(replace(course, **_shared(row.at(course)))) for row in ROWS.values()}
    assert courses == {repr(course)}
    assert len({row.at(course).evaluate_every for row in ROWS.values()}) == 1
    assert {row.at(course).weighting for row in ROWS.values()} == {"uniform"}


def _shared(settings):
    return {name: getattr(settings, name) for name in ("steps", "batch", "seed")}


def test_parameters_of_the_loras_are_what_their_names_say(text):
    task = PictureTask(load_base(paths.BASE), text, "demo")

    def count(name):
        objective = ROWS[name].recipe(task, ROWS[name].at(Course()))
        return sum(p.numel() for p in objective.parameters() if p.requires_grad)

    for name, times in ((EQUAL, 1), (TIMES_4, 4), (TIMES_16, 16), (DEFT, 1)):
        assert count(name) == pytest.approx(times * count(FOUR), rel=0.05)


def test_an_ordering_holds_by_the_mean_of_pairs():
    better, other = torch.tensor([0.9, 0.5, 0.8]), torch.tensor([0.8, 0.4, 0.7])
    runs = {"a": [{"style_agreement": better}], "b": [{"style_agreement": other}]}
    forth, back = ordering(runs, [("a", "b"), ("b", "a")]).values()
    assert forth["holds"]
    assert not back["holds"]
    assert forth["difference"] == pytest.approx(0.1, abs=1e-6)
    assert forth["ci95"] == pytest.approx([0.1, 0.1], abs=1e-6)  # pairs differ by one amount


def test_missing_teachers_are_said_with_what_makes_them(tmp_path):
    with pytest.raises(SystemExit, match=r"styles\.safetensors\. make demo-world .*--teachers"):
        main(["--quick", "--teachers", str(tmp_path)])
