"""The table of taught words on a tiny random world: from pictures to the JSON, and its sums."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.concepts import covariance, perfusion
from benchmarks.concepts.perfusion import (
    BASE_TWO,
    KNOBS,
    REAL,
    Size,
    conclusions,
    label,
    measure,
    real_pictures,
)
from benchmarks.concepts.word_pictures import Gallery, Wish, wishes
from benchmarks.concepts.words import (
    DREAMBOOTH,
    INVERSION,
    METHODS,
    PERFUSION,
    Recipes,
    School,
    training_photos,
)
from benchmarks.cost import concept_price
from difflora_core.adapters.attach import attach
from difflora_core.demo import paths
from difflora_core.demo.networks import concept_judge
from difflora_core.demo.networks.base import load_base
from difflora_core.demo.networks.judges import Judges, load_judge
from difflora_core.demo.networks.text import END, LENGTH, PAD, START, UNKNOWN, word_numbers
from difflora_core.demo.world.concepts import CONCEPTS, KNOWN, render_concept, render_items
from difflora_core.demo.world.scenes import render_portraits
from difflora_core.text.captions import captions
from difflora_core.text.clip_pair import ClipPairText, TokenMarks
from difflora_core.text.covariance import build_covariance

HAT, CAT = CONCEPTS[0], CONCEPTS[4]
TINY = Size((0, 4), perfusion.SCENES[:2], 1, ((0, 4),), 1, Recipes(steps=2, batch=1))


@pytest.fixture(scope="module")
def text():
    from difflora_core.demo.networks.text import new_text_encoders

    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(3)
        encoders = new_text_encoders()
    for encoder in encoders:
        encoder.get_input_embeddings().weight.data.mul_(20)
        encoder.requires_grad_(False).eval()
    return ClipPairText(encoders, word_numbers, TokenMarks(START, END, (END, PAD), UNKNOWN, LENGTH))


@pytest.fixture(scope="module")
def gallery(artefacts, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    c = build_covariance(text, captions(200, "demo"), ridge=1e-2)
    school = School(artefacts.base, text, c, "tiny", folder / "words")
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(4)
        network = concept_judge.ThingReader((4, 4, 4)).eval()
    judge = concept_judge.ConceptJudge(network, [HAT, CAT])
    return Gallery(school, artefacts.judges, judge, folder / "trials")


@pytest.fixture(scope="module")
def report(gallery):
    return measure(gallery, TINY)


def test_every_row_and_conclusion_is_there(report, gallery):
    rows = report.rows
    for method in METHODS:
        for knob in KNOBS[method]:
            row = rows[label(method, knob)]
            assert {
                "concept_similarity",
                "prompt_agreement",
                "seconds",
                "file_kb",
                "step_ms",
            } <= set(row)
            assert 0 <= row["prompt_agreement"] <= 1
    assert REAL in rows
    assert "both_recognised" in rows[BASE_TWO]
    facts = json.loads(report.to_json())
    assert isinstance(facts["front_dominates"], bool)
    assert 0 <= facts["two_concepts_both"] <= 1
    assert 0 <= facts["two_concepts_both_lora"] <= 1
    assert facts["hypervolume"].keys() == set(METHODS)
    small, large = rows[label(PERFUSION, 0.6)], rows[label(DREAMBOOTH, 1.0)]
    assert small["file_kb"] < large["file_kb"]


def test_a_second_table_takes_everything_from_disk(report, gallery, monkeypatch):
    monkeypatch.setattr("benchmarks.concepts.words.run_adaptation", None)
    monkeypatch.setattr("benchmarks.concepts.perfusion.costs", lambda *_: {})
    again = measure(gallery, TINY)
    for name, row in again.rows.items():
        assert row == {k: report.rows[name][k] for k in row}


def test_all_methods_learn_from_the_same_batches(gallery):
    """One lesson, one seed: what a step sees does not depend on the method."""
    seen = {}
    for method in METHODS:
        _, examples = gallery.school.lesson(HAT, training_photos(HAT))
        config = TINY.recipes.config(method)
        batch = examples.draw(config.batch)(torch.Generator().manual_seed(config.loop.seed))
        seen[method] = (batch["latents"], batch["noise"], batch["timesteps"], batch["masks"])
        assert config.loop.steps == TINY.recipes.steps
    for parts in seen.values():
        for own, first in zip(parts, seen[PERFUSION], strict=True):
            torch.testing.assert_close(own, first)


def test_knob_at_zero_is_the_base(gallery):
    wanted = wishes([HAT], perfusion.SCENES[:2], 0)
    plain = gallery.draw(wanted)
    for method in (DREAMBOOTH, INVERSION):
        taught = gallery.school.teach(HAT, method, TINY.recipes)
        words, adapters = gallery.school.dress([taught], 0.0)
        torch.testing.assert_close(gallery.draw(wanted, words, adapters), plain, atol=1e-4, rtol=0)


def test_kinds_are_read_by_the_judge_of_concepts(gallery, monkeypatch):
    """One attribute of five, whatever the classifier of plain colours would say."""
    wanted = wishes([HAT], perfusion.SCENES[:2], 0)
    images, agreement = render_concept(HAT, [1, 2], [1, 2]).images, {}
    for there in (0.9, 0.1):
        monkeypatch.setattr(
            gallery.judge,
            "read",
            lambda p, kind, there=there: (torch.full((len(p),), there), torch.zeros(len(p), 2, 3)),
        )
        agreement[there] = gallery.judged(images, wanted)["prompt_agreement"]
    torch.testing.assert_close(agreement[0.9] - agreement[0.1], torch.full((2,), 0.2))


def test_two_loras_are_their_sum(gallery):
    """The pair's change of one layer's output is the sum of the two changes."""
    taught = [gallery.school.teach(c, DREAMBOOTH, TINY.recipes) for c in (HAT, CAT)]
    layer = gallery.school.names[next(iter(taught[0].trained))]
    module = gallery.school.base.unet.get_submodule(layer)
    x = torch.randn(1, 3, module.in_features)
    outputs = []
    for chosen in (taught[:1], taught[1:], taught):
        _, adapters = gallery.school.dress(chosen, 1.0)
        with attach(gallery.school.base.unet, adapters, names=gallery.school.names):
            outputs.append(module(x) - 0)
    bare = module(x)
    both = (outputs[0] - bare) + (outputs[1] - bare)
    torch.testing.assert_close(outputs[2] - bare, both, atol=1e-6, rtol=1e-5)


def test_prompts():
    wish = Wish(perfusion.SCENES[0], (HAT, CAT), 1)
    assert wish.prompt().endswith("white shirt, wearing a <hat-a>, with a <cat-a>")
    assert wish.prompt(plain=True).endswith("white shirt, wearing a hat, with a cat")
    assert len(perfusion.SCENES) == 20
    seeds = [w.seed for concept in CONCEPTS for w in Size().wanted(concept)]
    assert len(set(seeds)) == len(seeds) == 320
    for concept in CONCEPTS:
        asked = Size().wanted(concept)[: len(perfusion.SCENES)]
        plain = [w for w in asked if w.scene.item != "none"]
        assert len(plain) == 10
        for w in plain:
            assert w.scene.item != concept.kind
            assert w.scene.item_colour != w.scene.shirt
            assert w.prompt().index(concept.word) < w.prompt().index(w.goals["beside"])
    hands = {"cup", "flower"}
    for a, b in perfusion.PAIRS:
        assert CONCEPTS[a].kind != CONCEPTS[b].kind
        assert {CONCEPTS[a].kind, CONCEPTS[b].kind} != hands


@pytest.mark.parametrize("kind", ["hat", "cup", "cat"])
def test_the_judge_knows_plain_things_beside_a_concept(kind):
    """Real ones are seen; the same thing in the concept's colours is not taken for a plain one."""
    judge = concept_judge.load_concept_judge(paths.CONCEPT_JUDGE)
    concept = next(c for c in CONCEPTS if c.kind == kind)
    wanted = [w for w in Size().wanted(concept) if w.scene.item != "none"]
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
    base, wanted = load_base(paths.BASE), 3 * Size().wanted(HAT)
    assert {w.goals["expression"] for w in wanted} == {"neutral", "sad", "smiling", "surprised"}
    judges = Judges({"attributes": load_judge(paths.PROMPT_JUDGE)})
    real = real_pictures(wanted)
    shown = ((real, 0.97), (base.decode_latents(base.encode_images(real)), 0.94))
    for images, share in shown:
        read = judges.attributes(images)
        for name in ("look", "expression", "background", "shirt"):
            pairs = list(zip(read[name], (w.goals[name] for w in wanted), strict=True))
            assert sum(said == truth for said, truth in pairs) >= share * len(pairs), name
            for answer in {truth for _, truth in pairs}:
                right = [said == truth for said, truth in pairs if truth == answer]
                assert sum(right) >= 0.9 * len(right), (name, answer)


@pytest.mark.parametrize("concept", KNOWN, ids=lambda c: c.word)
def test_the_judge_knows_real_concepts(concept):
    """On people that it has not met; alone and beside another thing."""
    judge = concept_judge.load_concept_judge(paths.CONCEPT_JUDGE)
    people = range(105_000, 105_020)
    real = render_concept(concept, people, range(20)).images
    assert judge.recognised(real, concept).float().mean() >= 0.9
    assert judge.likeness(real, concept).mean() >= 0.7
    for other in KNOWN:
        if other != concept:
            assert judge.recognised(real, other).float().mean() <= 0.1
    bare = render_portraits(people, range(20), [*perfusion.SCENES]).images
    assert judge.recognised(bare, concept).float().mean() <= 0.05
    assert judge.likeness(bare, concept).mean() <= 0.1
    second = CONCEPTS[4] if concept.kind == "hat" else HAT
    both = render_items(people, range(20), perfusion.SCENES, [(concept, second)] * 20)
    for one in (concept, second):
        assert judge.recognised(both, one).float().mean() >= 0.9


def test_conclusions_by_hand():
    """Two concepts; the yardsticks are under Perfusion's line until one of them leaves it."""
    line = torch.tensor([[0.2, 0.9], [0.6, 0.8]])[:, None].expand(-1, 2, -1)
    sweeps = {method: line - 0.1 for method in METHODS} | {PERFUSION: line}
    reference = torch.zeros(2, dtype=torch.float64)
    facts = conclusions(sweeps, reference)
    assert facts["front_dominates"] is True
    assert facts["front_dominates_share"] == 1.0
    assert facts["front_shortfall"] == pytest.approx(-0.1)
    assert facts["hypervolume"][PERFUSION] == pytest.approx(0.2 * 0.9 + 0.4 * 0.8)
    better = {**sweeps, DREAMBOOTH: torch.full((1, 2, 2), 0.85)}
    facts = conclusions(better, reference)
    assert facts["front_dominates"] is False
    assert facts["front_shortfall"] == pytest.approx(0.25)
    assert facts["hypervolume_gain_ci95"][DREAMBOOTH][0] < 0


def test_more_captions_come_closer(text):
    rows = covariance.table(text, (50, 400))
    few, many = rows["50 captions"], rows["400 captions"]
    assert many["covector_error"] < few["covector_error"]
    assert many["gate_error_mean"] < few["gate_error_mean"]
    assert many["tokens"] > few["tokens"]


def test_price_on_a_narrow_unet():
    config = {**concept_price.SDXL_UNET_CONFIG, "block_out_channels": [32, 64, 64]}
    config |= {"attention_head_dim": [2, 4, 4], "cross_attention_dim": 32}
    rows = concept_price.price(2, config, side=8)
    assert rows["base"]["cpu_ratio"] == 1.0
    assert rows["perfusion"]["projections"] == 140
    assert rows["infusion"]["projections"] == 70
    assert all(row["cpu_seconds_per_step"] > 0 for row in rows.values())


def test_equal_shapes_share_their_memory():
    config = {**concept_price.SDXL_UNET_CONFIG, "block_out_channels": [32, 64, 64]}
    config |= {"attention_head_dim": [2, 4, 4], "cross_attention_dim": 32}
    unet = concept_price.small_memory_unet(config)
    parameters = [p for m in unet.modules() for p in m.parameters(recurse=False)]
    shapes = {tuple(p.shape) for p in parameters}
    assert len({p.data_ptr() for p in parameters}) == len(shapes) < len(parameters) / 10


@pytest.mark.slow
def test_price_at_full_size():
    """All 140 projections of SDXL: at most 3 % of a step."""
    rows = concept_price.price(5)
    assert rows["perfusion"]["projections"] == 140
    assert rows["perfusion"]["cpu_ratio"] <= 1.03
