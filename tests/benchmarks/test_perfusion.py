"""The table of new words on a tiny random world: from pictures to the JSON, and its sums."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

from benchmarks.command import benchmark_console
from benchmarks.concepts import choose_pairs, choose_rates, covariance, perfusion
from benchmarks.concepts.methods import DREAMBOOTH, INVERSION, METHODS
from benchmarks.concepts.methods.base import ConceptModels, TrainingSettings
from benchmarks.concepts.methods.library import LibraryMethod
from benchmarks.concepts.methods.perfusion import METHOD as PERFUSION
from benchmarks.concepts.perfusion import BASE_TWO, REAL, Size, conclusions, measure, real_pictures
from benchmarks.concepts.sweep import SCENES
from benchmarks.concepts.word_pictures import ConceptEvaluator, EvaluationPrompt, evaluation_prompts
from benchmarks.concepts.words import ConceptTrainer
from difflora_core.adapters.attach import attach
from difflora_core.demo import paths
from difflora_core.demo.networks import concept_judge
from difflora_core.demo.networks.base import load_base
from difflora_core.demo.networks.judges import Judges, load_judge
from difflora_core.demo.networks.views import initialise
from difflora_core.demo.world.concepts import CONCEPTS, KNOWN, render_concept, render_items
from difflora_core.demo.world.scenes import render_portraits
from difflora_core.text.captions import captions
from difflora_core.text.covariance import build_covariance

HAT, CAT = CONCEPTS[0], CONCEPTS[4]
TINY = Size((0, 4), SCENES[:2], ((0, 4),), 1, TrainingSettings(steps=2, batch=1), (0, 1))


@pytest.fixture(scope="module")
def evaluator(artefacts, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    c = build_covariance(text, captions(200, "demo"), ridge=1e-2)
    models = ConceptModels(artefacts.base, text, c)
    trainer = ConceptTrainer(models, "tiny", folder / "words")
    network = concept_judge.ThingReader((4, 4, 4)).eval()
    initialise(network, 4)
    judge = concept_judge.ConceptJudge(network, [HAT, CAT])
    return ConceptEvaluator(trainer, artefacts.judges, judge, folder / "trials")


@pytest.fixture(scope="module")
def report(evaluator):
    return measure(evaluator, TINY)


@pytest.mark.slow
def test_every_row_and_conclusion_is_there(report):
    rows = report.rows
    columns = {"concept_similarity", "prompt_agreement", "recognised"}
    for method in METHODS.values():
        for setting in method.settings:
            row, leak = rows[method.label(setting)], {"leak"} if setting == method.usual else set()
            assert set(row) == columns | leak | {"seconds", "file_kb", "step_ms"}
        both = rows[f"two: {method.label(method.pair_setting)}"]["both_recognised"]
        for known, fact in (
            (PERFUSION, "two_concepts_both"),
            (DREAMBOOTH, "two_concepts_both_lora"),
        ):
            if method is known:
                assert report.facts[fact] == both
    assert REAL in rows
    assert "both_recognised" in rows[BASE_TWO]
    facts = json.loads(report.to_json())
    assert isinstance(facts["front_dominates"], bool)
    small, large = rows[PERFUSION.label(0.6)], rows[DREAMBOOTH.label(1.0)]
    assert small["file_kb"] < large["file_kb"]
    assert facts["hypervolume"].keys() == set(METHODS)
    assert facts["leak"].keys() == {"base", *METHODS}
    for name in METHODS:
        more = facts["leak"][name] - facts["leak"]["base"]  # means in two precisions
        assert (abs(more) < 1e-6) == (name != DREAMBOOTH.name)


def test_names_of_rows():
    assert PERFUSION.label(0.6) == "Perfusion, bias 0.6"
    assert [m.label(0.5) for m in (DREAMBOOTH, INVERSION)] == [
        "DreamBooth LoRA x 0.5",
        "Textual Inversion x 0.5",
    ]


@pytest.mark.slow
def test_a_second_table_takes_everything_from_disk(report, evaluator, monkeypatch):
    monkeypatch.setattr("benchmarks.concepts.words.run_adaptation", None)
    monkeypatch.setattr("benchmarks.concepts.perfusion.costs", lambda *_: {})
    again = measure(evaluator, TINY)
    for name, row in again.rows.items():
        assert row == {k: report.rows[name][k] for k in row}


def test_all_methods_learn_from_the_same_batches(evaluator, tmp_path):
    """What a method is given in training, step by step, does not depend on the method."""
    trainer, seen = replace(evaluator.trainer, folder=tmp_path), {}
    for method in METHODS.values():
        batches = []

        def watch(module, inputs, method=method, batches=batches):
            if isinstance(module, method.objective) and module.training:
                batches.append(inputs[0])

        hook = torch.nn.modules.module.register_module_forward_pre_hook(watch)
        try:
            trainer.train(HAT, method, TINY.training)
        finally:
            hook.remove()
        seen[method.name] = batches
    for batches in seen.values():
        assert len(batches) == TINY.training.steps
        for own, first in zip(batches, seen[PERFUSION.name], strict=True):
            for name in ("latents", "noise", "timesteps", "masks"):
                torch.testing.assert_close(own[name], first[name], atol=0, rtol=0)
    first, second = seen[PERFUSION.name]
    assert not torch.equal(first["noise"], second["noise"])


BY_STRENGTH = [method for method in METHODS.values() if method is not PERFUSION]


@pytest.mark.parametrize("method", BY_STRENGTH, ids=lambda m: m.name)
def test_strength_zero_is_the_plain_word_and_strength_one_is_not(evaluator, method):
    wanted = evaluation_prompts([HAT], SCENES[:2], 0)
    trained = evaluator.trainer.train(HAT, method, TINY.training)
    plain = evaluator.draw(wanted)
    off, on = (
        evaluator.draw(wanted, *method.apply(evaluator.models, [trained], strength))
        for strength in (0.0, 1.0)
    )
    assert float((on - plain).abs().max()) > 1e-3
    if not isinstance(method, LibraryMethod):  # whose word has an embedding of its own
        torch.testing.assert_close(off, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda m: m.name)
def test_only_a_lora_touches_the_plain_word(evaluator, method):
    """A word acts where it stands; a LoRA has no place."""
    wanted = evaluation_prompts([HAT], SCENES[:2], 0)
    trained = evaluator.trainer.train(HAT, method, TINY.training)
    changes = method.apply(evaluator.models, [trained], method.usual)
    plain = evaluator.draw(wanted, *changes, plain=True)
    assert torch.equal(plain, evaluator.draw(wanted)) == (method is not DREAMBOOTH)


def test_kinds_are_read_by_the_judge_of_concepts(evaluator, monkeypatch):
    """One attribute of five, whatever the classifier of plain colours would say."""
    wanted = evaluation_prompts([HAT], SCENES[:2], 0)
    images, agreement = render_concept(HAT, [1, 2], [1, 2]).images, {}
    for there in (0.9, 0.1):
        monkeypatch.setattr(
            evaluator.judge,
            "read",
            lambda p, kind, there=there: (torch.full((len(p),), there), torch.zeros(len(p), 2, 3)),
        )
        agreement[there] = evaluator.judged(images, wanted)["prompt_agreement"]
    torch.testing.assert_close(agreement[0.9] - agreement[0.1], torch.full((2,), 0.2))


def test_two_loras_are_their_sum(evaluator):
    """The pair's change of one layer's output is the sum of the two changes."""
    models = evaluator.models
    trained = [evaluator.trainer.train(c, DREAMBOOTH, TINY.training) for c in (HAT, CAT)]
    layer = models.module_names[next(iter(trained[0].weights))]
    module = models.base.unet.get_submodule(layer)
    x = torch.randn(1, 3, module.in_features, generator=torch.Generator().manual_seed(6))
    bare, changes = module(x), []
    for chosen in (trained[:1], trained[1:], trained):
        _, make = DREAMBOOTH.apply(models, chosen, 1.0)
        adapters = make(models.text.encode(["a hat"], {}))
        with attach(models.base.unet, adapters, names=models.module_names):
            changes.append(module(x) - bare)
    assert min(float(change.abs().max()) for change in changes) > 1e-4
    torch.testing.assert_close(changes[2], changes[0] + changes[1], atol=1e-6, rtol=1e-5)


def test_prompts():
    prompt = EvaluationPrompt(SCENES[0], (HAT, CAT), 1)
    assert prompt.text().endswith("white shirt, wearing a <hat-a>, with a <cat-a>")
    assert prompt.text(plain=True).endswith("white shirt, wearing a hat, with a cat")
    assert len(SCENES) == 20
    seeds = [w.seed for c in CONCEPTS for s in Size().seeds for w in Size().wanted(c, s)]
    assert len(set(seeds)) == len(seeds) == 960
    for concept in CONCEPTS:
        asked = Size().wanted(concept)
        again = Size().wanted(concept, 1)
        assert [w.text() for w in asked] == [w.text() for w in again]
        plain = [w for w in asked if w.scene.item != "none"]
        assert len(plain) == 10
        for w in plain:
            assert w.scene.item != concept.kind
            assert w.scene.item_colour != w.scene.shirt
            assert w.text().index(concept.word) < w.text().index(w.goals["beside"])
    hands = {"cup", "flower"}
    assert {number for pair in perfusion.PAIRS for number in pair} == set(range(len(CONCEPTS)))
    for a, b in perfusion.PAIRS:
        assert CONCEPTS[a].kind != CONCEPTS[b].kind
        assert {CONCEPTS[a].kind, CONCEPTS[b].kind} != hands


@pytest.mark.parametrize("kind", ["hat", "cup", "cat"])
def test_the_judge_knows_plain_things_beside_a_concept(kind):
    """Real ones are seen; the same thing in the concept's colours is not taken for a plain one."""
    judge = concept_judge.load_concept_judge(paths.CONCEPT_JUDGE)
    concept = next(c for c in CONCEPTS if c.kind == kind)
    wanted = [w for seed in (0, 1) for w in Size().wanted(concept, seed)]
    wanted = [w for w in wanted if w.scene.item != "none"]
    seen = [
        judge.recognised(p[None], w.beside)
        for p, w in zip(real_pictures(wanted), wanted, strict=True)
    ]
    assert torch.cat(seen).float().mean() >= 0.9
    people = range(105_000, 105_000 + len(wanted))
    things = [(concept, replace(concept, kind=w.scene.item)) for w in wanted]
    images = render_items(people, range(len(wanted)), [w.scene for w in wanted], things)
    seen = [judge.recognised(p[None], w.beside) for p, w in zip(images, wanted, strict=True)]
    assert torch.cat(seen).float().mean() <= 0.05


def test_what_prompts_ask_can_be_read_through_the_vae():
    """Each answer by itself: a judge that takes neutral faces for sad ones measures itself."""
    base, wanted = load_base(paths.BASE), 6 * Size().wanted(HAT)
    assert {w.goals["expression"] for w in wanted} == {"neutral", "sad", "smiling", "surprised"}
    judges = Judges({"attributes": load_judge(paths.PROMPT_JUDGE)})
    real = real_pictures(wanted)
    shown = ((real, 0.97), (base.decode_latents(base.encode_images(real)), 0.94))
    for images, share in shown:
        read = judges.attributes(images)
        for name in ("look", "expression", "background", "shirt"):
            pairs = list(zip(read[name], (w.goals[name] for w in wanted), strict=True))
            assert sum(answered == truth for answered, truth in pairs) >= share * len(pairs), name
            for answer in {truth for _, truth in pairs}:
                right = [answered == truth for answered, truth in pairs if truth == answer]
                assert sum(right) >= 0.9 * len(right), (name, answer)


@pytest.mark.parametrize("concept", KNOWN, ids=lambda c: c.word)
def test_the_judge_knows_real_concepts(concept):
    """On people that it has not met; alone and beside another thing."""
    judge = concept_judge.load_concept_judge(paths.CONCEPT_JUDGE)
    judge.read = cache(judge.read)  # one reading of a kind serves all its looks
    people = range(105_000, 105_020)
    real = render_concept(concept, people, range(20)).images
    assert judge.recognised(real, concept).float().mean() >= 0.9
    assert judge.likeness(real, concept).mean() >= 0.7
    for other in KNOWN:
        if other != concept:
            assert judge.recognised(real, other).float().mean() <= 0.1
    bare = render_portraits(people, range(20), [*SCENES]).images
    assert judge.recognised(bare, concept).float().mean() <= 0.05
    assert judge.likeness(bare, concept).mean() <= 0.1
    second = CONCEPTS[4] if concept.kind == "hat" else HAT
    both = render_items(people, range(20), SCENES, [(concept, second)] * 20)
    for one in (concept, second):
        assert judge.recognised(both, one).float().mean() >= 0.9


def test_conclusions_by_hand():
    """Two concepts; the baselines are under Perfusion's line until one of them leaves it."""
    line = torch.tensor([[0.2, 0.9], [0.6, 0.8]])[None, :, None].expand(3, -1, 2, -1)
    sweeps = {method: line - 0.1 for method in METHODS} | {PERFUSION.name: line}
    reference = torch.zeros(2, dtype=torch.float64)
    facts = conclusions(sweeps, reference)
    assert facts["front_dominates"] is True
    assert facts["front_dominates_share"] == 1.0
    assert facts["front_shortfall"] == pytest.approx(-0.1)
    assert facts["hypervolume"][PERFUSION.name] == pytest.approx(0.2 * 0.9 + 0.4 * 0.8)
    better = {**sweeps, DREAMBOOTH.name: torch.full((3, 1, 2, 2), 0.85)}
    facts = conclusions(better, reference)
    assert facts["front_dominates"] is False
    assert facts["front_shortfall"] == pytest.approx(0.25)
    assert facts["hypervolume_gain_ci95"][DREAMBOOTH.name][0] < 0


def test_seeds_that_disagree_widen_what_is_said():
    """One seed puts a LoRA .2 above Perfusion in likeness, the other as much below."""
    own = torch.full((2, 1, 4, 2), 0.5)
    theirs = own + torch.tensor([[0.2, 0.0], [-0.2, 0.0]])[:, None, None]
    sweeps = {method: own - 0.4 for method in METHODS}
    sweeps |= {PERFUSION.name: own, DREAMBOOTH.name: theirs}
    found = conclusions(sweeps, torch.zeros(2, dtype=torch.float64))
    gain, low, high = found["hypervolume_gain_ci95"][DREAMBOOTH.name]
    assert (gain, low, high) == pytest.approx((0.0, -0.1, 0.1))  # .5 x .2 in area
    assert 0 < found["front_dominates_share"] < 1


def test_a_part_of_the_table_keeps_the_pairs_within_it():
    part = Size().some([0, 2, 4], [1])
    assert (part.concepts, part.seeds, part.pairs) == ((0, 2, 4), (1,), ((0, 4), (0, 2)))
    assert Size().some(None, None) == Size()
    assert perfusion.two_concepts(None, {}, part.some([0], None)) == ({}, {})


def test_more_captions_come_closer(text):
    rows = covariance.table(text, (50, 400))
    few, many = rows["50 captions"], rows["400 captions"]
    assert many["covector_error"] < few["covector_error"]
    assert many["gate_error_mean"] < few["gate_error_mean"]
    assert many["tokens"] > few["tokens"]


def test_rates_of_the_largest_area_are_chosen(evaluator, monkeypatch, capsys):
    grid = ((0.001,), (0.1,), (0.01,))
    areas = iter([0.2, 0.7, 0.5])
    monkeypatch.setattr(choose_rates, "VALIDATION_CONCEPTS", (HAT,))
    monkeypatch.setattr(choose_rates, "hypervolume", lambda points, reference: next(areas))
    console = benchmark_console()
    method = replace(INVERSION, rate_grid=grid, settings=(1.0,))
    best = choose_rates.choose(evaluator, [method], 2, console, TINY.training)
    assert best == {"Textual Inversion": (0.1,)}
    printed = capsys.readouterr().out
    assert all(
        f"Textual Inversion {rates}: {area:.3f}" in printed
        for rates, area in zip(grid, (0.2, 0.7, 0.5), strict=True)
    )


def test_the_pair_setting_with_most_of_both_is_chosen(evaluator, monkeypatch, capsys):
    monkeypatch.setattr(choose_pairs, "METHODS", {INVERSION.name: INVERSION})
    monkeypatch.setattr(choose_pairs, "VALIDATION_CONCEPTS", (HAT, CAT))
    monkeypatch.setattr(choose_pairs, "VALIDATION_PAIRS", ((0, 1),))
    seen = []

    def columns(evaluator, wanted, trained, setting):
        assert [w.concepts for w in wanted[0][0]] == [(HAT, CAT)] * 2
        assert [*trained[0]] == [HAT.word, CAT.word]
        seen.append(setting)
        both = [1.0, float(setting < 1)]
        return {
            "all_recognised": torch.tensor(both),
            "concept_similarity": torch.full((2,), 0.5),
            "prompt_agreement": torch.ones(2),
        }

    monkeypatch.setattr(choose_pairs, "pair_columns", columns)
    best = choose_pairs.choose(evaluator, 2, benchmark_console(), TINY.training)
    assert best == {INVERSION.name: 0.75}
    assert seen == [*INVERSION.pair_grid]
    assert "Textual Inversion x 1: both 0.50  likeness 0.50" in capsys.readouterr().out
