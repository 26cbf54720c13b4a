"""The table of styles on a tiny random world: from pictures to the JSON, and its sums."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.prompts import QUICK
from benchmarks.styles.conclusions import AXES, interval, ordering
from benchmarks.styles.methods import CLAIMS, ROWS, rows_named
from benchmarks.styles.methods.base import Course
from benchmarks.styles.methods.deft import DEFT
from benchmarks.styles.methods.full import FULL
from benchmarks.styles.methods.lora import EQUAL, TIMES_4, TIMES_16
from benchmarks.styles.methods.styleinject import FOUR, ONE, SAME_LAYERS, SAME_RANK, STA
from benchmarks.styles.people import KnownPeople
from benchmarks.styles.pictures import BASE, TEACHER, DrawingPlan, StyleEvaluator
from benchmarks.styles.readers import RIDGE, TEST_SHARE, features, fitted_reader
from benchmarks.styles.routing import routing_columns
from benchmarks.styles.styles import Size, main, measure
from benchmarks.styles.tasks import EACH_LOOK, OF_LOOK, TASKS, TaskSize
from benchmarks.styles.trainer import StyleTrainer
from benchmarks.styles.world import StyleWorld
from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.demo import paths
from difflora_core.demo.networks.base import load_base
from difflora_core.demo.networks.chinese import ChineseText, translate
from difflora_core.demo.networks.concept_text import chinese_text
from difflora_core.demo.networks.style_judge import StyleJudge
from difflora_core.demo.networks.views import ATTRIBUTES, attribute_labels
from difflora_core.demo.world.art_styles import ART_STYLES
from difflora_core.demo.world.scenes import render_portraits
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.models.layers import DrawnFrom
from difflora_core.training.adaptation_run import EVALUATION_BATCHES
from difflora_core.training.distillation import DistillationObjective
from difflora_core.training.picture_task import PictureTask

TINY = Size(
    ("ink",),
    (0,),
    (0,),
    Course(steps=2, batch=1),
    TaskSize(prompts=2, shots=1, held_out=1, sampling_steps=2),
    DrawingPlan((QUICK[0], QUICK[1], QUICK[5]), noises=2, people=2, steps=2),
    step_rounds=1,
)
SOME = [EQUAL, STA, FOUR, "option, spread added"]
LATE = [EQUAL, STA, FOUR]
JUDGED = {"style_agreement", "teacher_distance", "prompt_agreement", "diversity", "face"}
COSTS = {"parameters", "file_kb", "best_step", "late_loss", "seconds", "step_ms"}


def random_teacher(base, seed):
    """The base with other weights."""
    unet = UNet2DConditionModel.from_config(base.unet.config)
    unet.load_state_dict(base.unet.state_dict())
    generator = torch.Generator().manual_seed(seed)
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
    return KnownPeople(LoRAWeights(layers), torch.rand(2, 3, 64, 64, 3, generator=generator))


@pytest.fixture(scope="module")
def portraits():
    """Twelve people."""
    return render_portraits(range(9_000_000, 9_000_012), range(12))


@pytest.fixture(scope="module")
def readers(artefacts, portraits):
    scenes = portraits.scenes
    return {
        style: fitted_reader(artefacts.judges, paint, paint(portraits.images), scenes)
        for style, paint in ART_STYLES.items()
    }


@pytest.fixture(scope="module")
def world(artefacts, text, readers, tmp_path_factory):
    base, generator = artefacts.base, torch.Generator().manual_seed(2)
    names = ("plain", *ART_STYLES)
    judge = StyleJudge(names, torch.randn(19, 4, generator=generator), torch.zeros(4))
    teachers = {
        style: PictureTask(random_teacher(base, seed), text, "demo")
        for seed, style in enumerate(ART_STYLES)
    }
    with DrawnFrom(torch.Generator().manual_seed(9)):
        reads = chinese_text(ChineseText().requires_grad_(False).eval())
    return StyleWorld(
        PictureTask(base, text, "demo"),
        PictureTask(base, reads, "demo"),
        teachers,
        judge,
        readers,
        known_people(artefacts),
        tmp_path_factory.mktemp("styles"),
    )


@pytest.fixture(scope="module")
def report(world):
    return measure(world, TINY, names=SOME)


@pytest.fixture(scope="module")
def one_task(world):
    """All rows."""
    return measure(world, TINY, ["scenario 1"])


def test_every_task_and_conclusion_is_there(report):
    for task, kind in TASKS.items():
        for name in (TEACHER, BASE):
            assert set(report.rows[f"{task}: {name}"]) == JUDGED
        for name in LATE if kind.late else SOME:
            routed = set() if name == EQUAL else {"routed_apart", "routed_by_look"}
            assert set(report.rows[f"{task}: {name}"]) == JUDGED | COSTS | routed
            # the best state is the lowest on held-out pictures, so the last one is no lower
            assert report.rows[f"{task}: {name}"]["late_loss"] >= 1 - 1e-6
    assert len(report.rows) == (len(TASKS) - 1) * (2 + len(SOME)) + 2 + len(LATE)
    written = json.loads(report.to_json())
    for name, row in written["rows"].items():
        for column in JUDGED:
            low, high = written["ci95"][name][column]
            assert low - 1e-6 <= row[column] <= high + 1e-6
    for task, held in written["ordering_holds"].items():
        assert set(held) == {f"{FOUR} > {EQUAL}", f"{FOUR} > {STA}", f"{STA} > {EQUAL}"}
        options = set() if TASKS[task].late else {f"option, spread added > {FOUR}"}
        assert set(written["options"][task]) == options


@pytest.mark.slow
def test_every_claim_is_judged_where_all_rows_are(one_task):
    claims = {f"{better} > {other}" for better, other in CLAIMS}
    assert set(one_task.facts["ordering_holds"]["scenario 1"]) == claims


def test_the_teacher_is_its_own_pattern(report):
    for task in TASKS:
        assert report.rows[f"{task}: {TEACHER}"]["teacher_distance"] == 0
        assert report.rows[f"{task}: {BASE}"]["teacher_distance"] > 0.01


@pytest.mark.slow
def test_every_row_changes_the_pictures(one_task):
    """Two steps at these rates move every method to a place of its own."""
    distances = [row["teacher_distance"] for row in one_task.rows.values()]
    assert len(set(distances)) == len(distances) == 2 + len(ROWS)


def test_three_looks_are_wanted_of_three_teachers(world, portraits):
    """Each picture is measured against the teacher whose style its prompt's look stands for."""
    evaluator = StyleEvaluator(world, TINY.plan)
    looks = [scene.look for scene in TINY.plan.scenes]
    assert looks == ["photo", "cartoon", "painting"]
    apart = [evaluator.teacher(style) for style in ("ink", "poster", "pastel")]
    together = evaluator.teacher(EACH_LOOK)
    for name, values in together.items():
        expected = torch.stack([apart[k][name][k] for k in range(3)])
        torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)
    three = TASKS["three looks"].make(world, EACH_LOOK, TINY.tasks).examples
    assert len(three) == 3 * len(TASKS["few shots"].make(world, "ink", TINY.tasks).examples)


def test_late_training_keeps_the_last_state(world, tmp_path):
    """At a rate that is far too high the best state is an early one, and it is not what is kept."""
    task = TASKS["few shots"].make(world, "ink", TINY.tasks)
    row, course = ROWS[EQUAL].with_rate(0.03).long(Course(steps=3, batch=1))
    assert (course.steps, row.settings.learning_rate) == (12, 0.12)
    trainer = StyleTrainer(tmp_path)
    best, last = (trainer.train(task, row, course, last=keep) for keep in (False, True))
    assert best.costs["best_step"] == last.costs["best_step"] < 12
    assert best.costs["late_loss"] == last.costs["late_loss"] > 1
    assert size(last) > 1.5 * size(best)


def size(trained):
    """Largest number of what was learned."""
    layers = trained.adaptation.layers.values()
    return max(float(t.abs().max()) for each in layers for t in each.values() if t.ndim > 1)


def test_a_second_table_takes_everything_from_disk(report, world, monkeypatch):
    monkeypatch.setattr("benchmarks.styles.trainer.run_adaptation", None)
    monkeypatch.setattr("benchmarks.styles.pictures.draw_latents", None)
    again = measure(world, TINY, names=SOME)
    for name, row in again.rows.items():
        assert set(row) == set(report.rows[name])
        kept = {k: v for k, v in row.items() if k != "step_ms"}  # which is measured anew
        assert kept == {k: report.rows[name][k] for k in kept}
    assert again.facts == report.facts


def test_the_teacher_is_told_in_its_own_language_what_the_student_is(world):
    given = TASKS["scenario 2"].make(world, "ink", TINY.tasks)
    pairs = [*given.examples.prompts, *given.held_out.prompts]
    for (prompt,) in pairs:
        assert translate(given.task.spoken[prompt]) == prompt != given.task.spoken[prompt]
        assert world.chinese.text.special.unknown not in world.chinese.text.tokens(prompt)
        assert given.look(prompt) in OF_LOOK
    assert given.task.loss.features == 0  # the languages differ, so outputs alone are compared


def test_the_teacher_is_asked_once_for_each_batch(world, tmp_path, monkeypatch):
    """A second row of the seed asks nothing, and what is learned is what it is without memory."""
    asked, ask = [], DistillationObjective.teacher_answer
    monkeypatch.setattr(
        DistillationObjective,
        "teacher_answer",
        lambda self, batch: asked.append(1) or ask(self, batch),
    )
    task, course = TASKS["scenario 1"].make(world, "ink", TINY.tasks), TINY.course
    plain = replace(task, objective=DistillationObjective)
    made = []
    for given, folder in ((task, "a"), (task, "b"), (plain, "c")):
        made.append(StyleTrainer(tmp_path / folder).train(given, ROWS[FOUR], course))
        asked.append(0)
    counts = [len(part) for part in "".join(map(str, asked)).split("0")]
    assert counts[0] == course.steps + EVALUATION_BATCHES
    assert counts[1] == 0
    assert counts[2] == course.steps + EVALUATION_BATCHES * (course.steps + 1)
    StyleTrainer(tmp_path / "d").train(task, ROWS[STA], replace(course, seed=5))
    assert sum(asked[asked.index(0) :]) == counts[2] + counts[0]
    layers = [one.adaptation.layers for one in made]
    for name, layer in layers[0].items():
        for key, tensor in layer.items():
            assert all(torch.equal(other[name][key], tensor) for other in layers[1:])


def test_routing_is_what_a_router_tells_apart():
    looks = ["photo", "cartoon", "photo", "cartoon"]
    by_look = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    by_chance = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])
    alike, alone = torch.full((4, 2), 0.5), torch.ones(4, 1)
    for weights, wanted in ((by_look, (0.5, 1.0)), (by_chance, (0.4, 0.0)), (alike, (0.0, 0.0))):
        made = routing_columns([weights, alone], looks)
        assert (made["routed_apart"], made["routed_by_look"]) == pytest.approx(wanted)
    both = routing_columns([by_look, by_chance], looks)
    assert both == pytest.approx({"routed_apart": 0.45, "routed_by_look": 0.5})
    assert routing_columns([alone], looks) == routing_columns([], looks) == {}


def test_chance_is_what_its_words_say():
    """Of mixtures without any order, a share (looks - 1) / (pictures - 1) lies between looks."""
    generator, looks = torch.Generator().manual_seed(0), ["a"] * 9 + ["b"] * 4 + ["c"] * 2
    layers = [torch.rand(15, 4, generator=generator).softmax(1) for _ in range(2000)]
    assert routing_columns(layers, looks)["routed_by_look"] == pytest.approx(2 / 14, abs=0.01)


def test_sta_alone_is_a_spread_and_nothing_else(world, tmp_path):
    task = TASKS["scenario 1"].make(world, "ink", TINY.tasks)
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

    same = ((EQUAL, 1), (SAME_LAYERS, 1), (TIMES_4, 4), (TIMES_16, 16), (DEFT, 1))
    for name, times in same:
        assert count(name) == pytest.approx(times * count(FOUR), rel=0.05)
    spread_and_router = count(ONE) - count(SAME_RANK)
    assert 0 < spread_and_router < 0.12 * count(ONE)  # the paper's: 3.34 and 3.19 million


def runs(style, prompt, distance=(0.1, 0.1, 0.1), seeds=1):
    columns = {"style_agreement": style, "prompt_agreement": prompt, "teacher_distance": distance}
    columns["face"] = (0.5, 0.5, 0.5)
    made = {name: torch.tensor(values) for name, values in columns.items()}
    return {("ink", seed): made for seed in range(seeds)}


def test_an_ordering_holds_by_pairs_on_both_axes():
    found = ordering(
        {
            "a": runs((0.9, 0.5, 0.8), (0.7, 0.7, 0.7), distance=(0.3, 0.2, 0.1)),
            "b": runs((0.8, 0.4, 0.7), (0.6, 0.6, 0.6), distance=(0.4, 0.3, 0.2)),
            "more style, less prompt": runs((1.0, 0.9, 1.0), (0.6, 0.6, 0.6)),
            "by chance": runs((0.9, 0.1, 0.9), (0.9, 0.3, 0.9)),
        },
        [("a", "b"), ("b", "a"), ("more style, less prompt", "a"), ("by chance", "b"), ("a", "c")],
    )
    assert {name: (claim["holds"], claim["apart"]) for name, claim in found.items()} == {
        "a > b": (True, True),
        "b > a": (False, False),
        "more style, less prompt > a": (False, False),  # style alone does not do
        "by chance > b": (False, False),
    }
    first = found["a > b"]
    for axis in AXES:  # pairs differ by one amount; a smaller distance is better
        expected = 0 if axis == "face" else 0.1
        assert first[axis]["difference"] == pytest.approx(expected, abs=1e-6)
        assert first[axis]["ci95"] == pytest.approx([expected, expected], abs=1e-6)


def test_an_interval_knows_of_seeds_and_of_prompts():
    """Two runs apart by 1 and the same on all prompts: the interval is that of runs."""
    among_runs = interval(torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    assert (among_runs.low, among_runs.value, among_runs.high) == (0, 0.5, 1)
    among_prompts = interval(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert (among_prompts.low, among_prompts.value, among_prompts.high) == (0, 0.5, 1)
    values = torch.rand(3, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = values - values.mean(1, keepdim=True)  # runs are alike, so prompts alone count
    found, plain = interval(values, 20_000), values.mean(0).std() / 40**0.5
    assert found.high - found.low >= 2 * 1.9 * float(plain)


def test_rows_are_named_by_patterns():
    assert rows_named(["StyleInject, n = 1"]) == [ONE]
    assert rows_named(["*n = 1", "full*"]) == [FULL, ONE]
    with pytest.raises(SystemExit, match=r"No row is named 'LoRa'; there are: full fine-tune; "):
        rows_named(["LoRA*", "LoRa"])


def test_a_reader_is_the_ridge_regression_of_what_it_was_told(artefacts, readers, portraits):
    """The same answers by least squares with rows that pull to zero, in float64."""
    paint, told = ART_STYLES["poster"], torch.arange(12) % TEST_SHARE != 0
    seen = features(artefacts.judges, paint(portraits.images)).double()
    x, labels = seen[told], attribute_labels(portraits.scenes)["shirt"][told]
    y = torch.nn.functional.one_hot(labels, len(ATTRIBUTES["shirt"])).double()
    centred = x - x.mean(0)
    pull = (RIDGE * centred.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1]).double()
    wide = torch.cat([centred, pull])
    told_rows = torch.cat([y - y.mean(0), torch.zeros(x.shape[1], y.shape[1]).double()])
    weight = torch.linalg.lstsq(wide, told_rows, driver="gels").solution
    expected = (seen - x.mean(0)) @ weight + y.mean(0)
    reader = readers["poster"]
    sizes = [len(answers) for answers in ATTRIBUTES.values()]
    k = list(ATTRIBUTES).index("shirt")
    got = (seen.float() @ reader.weight + reader.bias).split(sizes, 1)[k]
    torch.testing.assert_close(got.double(), expected, atol=2e-4, rtol=0)
    read = reader.attributes(paint(portraits.images))["shirt"]
    assert read == [ATTRIBUTES["shirt"][j] for j in expected.argmax(1).tolist()]
    assert set(reader.accuracy) == set(ATTRIBUTES)
    right = torch.tensor([ATTRIBUTES["shirt"].index(word) for word in read])
    truth = attribute_labels(portraits.scenes)["shirt"]
    share = float((right == truth)[~told].float().mean())
    assert reader.accuracy["shirt"] == pytest.approx(share)


def test_faces_are_compared_in_the_style(readers, portraits):
    """A painted picture is like its own photo, more than like anybody else's."""
    reader, photos = readers["ink"], portraits.images[:, None]
    painted = reader.paint(portraits.images)
    torch.testing.assert_close(reader.likeness(painted, photos), torch.ones(12))
    assert float(reader.likeness(painted, photos.roll(1, 0)).max()) < 0.99


def test_missing_teachers_are_said_with_what_makes_them(tmp_path):
    with pytest.raises(SystemExit, match=r"styles\.safetensors\. make demo-world .*--teachers"):
        main(["--quick", "--teachers", str(tmp_path)])
