"""The main table on a tiny random world: from photos to the JSON, and its arithmetic by hand."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks.identity import compression, dreambooth, rows
from benchmarks.identity.choose_strength import (
    best_strength,
    choose,
    read_choices,
    read_strengths,
    write_strengths,
)
from benchmarks.identity.conclusions import conclusions, label, last, sentences
from benchmarks.identity.drawing import select
from benchmarks.identity.experiment import Experiment, Trial, score
from benchmarks.identity.identity import (
    FULL_PLAN,
    QUICK_PLAN,
    make_report,
    parse,
    plan_of,
    rows_of,
    run,
    strengths_of,
)
from benchmarks.identity.linear import fit_linear
from benchmarks.identity.people import benchmark_people
from benchmarks.identity.rows import BASE, HEADLINE, DreamBoothRuns, Row
from difflora_core.commands import networks
from difflora_core.lora.tokens import TokenGrid
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.storage.lora_corpus import LoRACorpus

QUIET = Console(quiet=True)
RUNS = DreamBoothRuns(one_photo=(1,), all_photos=(1, 2))


def trial(row: str, face: list[float], error: list[float], strength: float = 1.0) -> Trial:
    columns = {
        "face_similarity": torch.tensor(face),
        "parameter_error": torch.tensor(error),
        "prompt_agreement": torch.full((len(face),), 0.9),
    }
    return Trial(row, strength, columns, {})


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return [
        trial("real pictures", [0.9, 0.9], [0.1, 0.1], 0.0),
        trial(BASE, [0.0, 0.0], [0.5, 0.5], 0.0),
        trial("wrong photo", [0.05, 0.01], [0.5, 0.5]),
        trial(HEADLINE, [0.3, 0.3], [0.4, 0.6]),
        trial(HEADLINE, [0.5, 0.3], [0.4, 0.3], 1.5),
        trial("DreamBooth, 8 photos, 100 steps", [0.2, 0.2], [0.2, 0.2]),
        trial("DreamBooth, 8 photos, 300 steps", [0.4, 0.4], [0.3, 0.3]),
        trial("DreamBooth, 1 photo, 100 steps", [0.8, 0.8], [0.0, 0.0]),
    ]


def test_conclusions_by_hand(trials):
    """Chosen strength of the prediction, best 8-photo row by each judge, never the 1-photo row."""
    facts = conclusions(trials)
    assert facts["recovered_share"] == pytest.approx(1.0)  # 0.4 of 0.4
    low, high = facts["recovered_share_ci95"]
    assert (low, high) == pytest.approx((0.75, 1.25))
    assert facts["recovered_share_parameters"] == pytest.approx(0.15 / 0.3)
    assert facts["yardstick"] == "DreamBooth, 8 photos, 300 steps"
    assert facts["yardstick_parameters"] == "DreamBooth, 8 photos, 100 steps"
    assert (facts["improved"], facts["improved_parameters"]) == (1.0, 1.0)
    assert facts["control_gaps"] == {"wrong photo": pytest.approx(0.03)}


def test_shares_of_real_pictures_by_hand(trials):
    through = trial("real pictures through the VAE", [0.8, 0.8], [0.2, 0.3], 0.0)
    facts = conclusions([*trials, through])
    assert facts["of_real"]["face"] == pytest.approx(0.4 / 0.9)
    assert facts["of_real"]["parameters"] == pytest.approx(0.35 / 0.25)
    assert conclusions(trials)["of_real"]["parameters"] is None


def test_how_far_the_headline_is_ahead_by_hand(trials):
    """At its own strength, person by person; a smaller parameter error is better."""
    through = trial("real pictures through the VAE", [0.8, 0.8], [0.2, 0.3], 0.0)
    facts = conclusions([*trials, through])
    ahead = facts["ahead"]
    assert set(ahead) == {label(t) for t in trials if t.row not in (HEADLINE, "real pictures")}
    assert ahead["DreamBooth, 8 photos, 300 steps"] == {
        "face_similarity": pytest.approx([0.0, -0.1, 0.1]),
        "parameter_error": pytest.approx([-0.05, -0.1, 0.0]),
    }
    assert ahead[BASE]["parameter_error"] == pytest.approx([0.15, 0.1, 0.2])
    said = [line for line in sentences(facts) if "better than base" in line]
    assert said == [
        f"{HEADLINE}, above 0 where better than base: +0.400 [+0.300, +0.500] by the face judge; "
        "+0.150 [+0.100, +0.200] by the parameter judge"
    ]
    assert conclusions([t for t in trials if t.row != HEADLINE])["ahead"] == {}


def test_the_paper_preset_has_its_own_share(trials):
    assert conclusions(trials)["paper"]["recovered_share"] is None
    facts = conclusions([*trials, trial("paper, 1 photo", [0.1, 0.1], [0.45, 0.45])])
    assert facts["paper"]["recovered_share"] == pytest.approx(0.25)
    assert facts["paper"]["recovered_share_parameters"] == pytest.approx(0.05 / 0.3)
    assert facts["recovered_share"] == pytest.approx(1.0)
    assert any(line.startswith("recovered share, paper: 0.25 [") for line in sentences(facts))


def test_seeds_of_the_headline_are_counted_with_people(trials):
    again = trial("functional, seed 1, 1 photo", [0.8, 0.6], [0.2, 0.1], 1.5)
    stranger = trial("functional, seed 1, 4 photos", [0.0, 0.0], [1.0, 1.0])
    seeds = conclusions([*trials, again, stranger])["seeds"]
    assert seeds["count"] == 2
    value, low, high = seeds["face_similarity"]
    assert value == pytest.approx((0.4 + 0.7) / 2)
    assert low == pytest.approx(0.3)  # the worst cell
    assert high == pytest.approx(0.8)  # the best
    assert conclusions(trials)["seeds"]["count"] == 1


def test_another_seed_is_drawn_at_the_strength_of_its_kind(artefacts, plan, short):
    model = artefacts.models["functional"]
    two = replace(
        artefacts, models={"functional, seed 1": model}, megabytes={"functional, seed 1": 7}
    )
    people = benchmark_people("validation", 1, plan.scenes)
    features = artefacts.features(people.photos.images[:, :4])
    made = rows.predicted_rows(two, "functional, seed 1", model, features, people)
    strengths = {row.name: row.strength_of for row in made}
    assert strengths["functional, seed 1, 1 photo"] == HEADLINE
    assert made[0].megabytes == 7


def test_without_the_functional_model_the_share_is_unknown(trials):
    facts = conclusions([t for t in trials if t.row != HEADLINE])
    assert facts["recovered_share"] is None
    assert facts["recovered_share_ci95"] == [None, None]


def test_labels_and_last(trials):
    assert label(trials[1]) == BASE
    assert label(trials[4]) == f"{HEADLINE} x 1.5"
    assert last(trials, HEADLINE) is trials[4]
    assert last(trials, "nothing") is None


def test_strengths(trials, tmp_path):
    row = Row("wrong photo", None, like=HEADLINE)
    assert strengths_of(row, {HEADLINE: 1.5}) == [1.0, 1.5]
    assert strengths_of(row, {}) == [1.0]
    assert strengths_of(row, {HEADLINE: 1.5}, chosen=True) == [1.5]
    path = tmp_path / "strengths.json"
    assert read_strengths(path) == {}
    write_strengths(path, {HEADLINE: {"strength": 1.5, "scores": {"1.5": 0.7}}})
    assert read_strengths(path) == {HEADLINE: 1.5}


def test_score_counts_both_judges_the_same(trials):
    real, base = trials[0], trials[1]
    assert score(real, base, real) == pytest.approx(1.0)
    assert score(base, base, real) == pytest.approx(0.0)
    assert score(trials[6], base, real) == pytest.approx((0.4 / 0.9 + 0.2 / 0.4) / 2)


def test_a_strength_that_loses_the_prompt_is_not_chosen(trials):
    base = trials[1]
    faithful, loud = trial("x", [0.3], [0.4], 1.0), trial("x", [0.6], [0.2], 2.0)
    loud.columns["prompt_agreement"].fill_(0.8)
    scores = {1.0: 0.4, 2.0: 0.8}
    assert best_strength([faithful, loud], scores, base) == 1.0
    loud.columns["prompt_agreement"].fill_(0.88)
    assert best_strength([faithful, loud], scores, base) == 2.0


@pytest.fixture
def short(monkeypatch):
    """DreamBooth and refinement of a step or two."""
    for name in ("SETTINGS", "CORPUS_SETTINGS"):
        brief = replace(getattr(rows, name), samples_per_step=1, steps=2, precision="no")
        monkeypatch.setattr(rows, name, brief)
    monkeypatch.setattr(dreambooth, "ALONE_STEPS", 1)
    few = replace(rows.refinement_config(4), steps=1, samples_per_step=1)
    monkeypatch.setattr(rows, "refinement_config", lambda rank: few)


def linear_baselines(artefacts):
    """PCA and ridge fitted on predictions of the functional model for five training people."""
    model = artefacts.models["functional"]
    down = {name: part.detach() for name, part in model.lae.down_factors().items()}
    crowd = benchmark_people("train", 5, ())
    seen = artefacts.features(crowd.photos.images[:, :2])
    weights = rows.predict(model, seen)
    grid = TokenGrid(artefacts.layout, ("up",))
    halves = [grid.decode(part, down) for part in grid.encode(weights)[0].split(3)]
    photos = [[person.select(k) for k in range(2)] for person in seen]
    return fit_linear(tuple(halves), (photos[:3], photos[3:]), artefacts.layout, 2)


def test_whole_table_on_a_tiny_world(artefacts, plan, short, tmp_path):
    linear = linear_baselines(artefacts)
    experiment = Experiment(replace(artefacts, linear=linear), plan, "validation", 2)
    trials = run(experiment, rows_of(experiment, RUNS), {HEADLINE: 1.5}, QUIET)
    names = [label(one) for one in trials]
    for wanted in (
        "real pictures",
        "real pictures through the VAE",
        "base",
        "another identity's LoRA",
        "mean LoRA",
        "wrong photo",
        "wrong photo x 1.5",
        "LoRA as in the corpus, 8 photos",
        "LAE reconstruction, functional",
        "LAE reconstruction, paper",
        "functional, 1 photo",
        "functional, 1 photo x 1.5",
        "functional, 4 photos",
        "paper, 1 photo",
        "paper, 4 photos",
        "DreamBooth, 1 photo, 1 steps",
        "DreamBooth, 8 photos, 1 steps",
        "DreamBooth, 8 photos, 2 steps",
        "functional, 1 photo, 1 refinement steps",
        "functional, 4 photos, 1 refinement steps",
        "ridge regression, 1 photo",
        "PCA-2 reconstruction",
    ):
        assert wanted in names
    assert len(set(names)) == len(names)
    read = json.loads(make_report(trials, experiment, {"split": "validation"}).to_json())
    assert isinstance(read["recovered_share"], float)
    assert len(read["recovered_share_ci95"]) == 2
    assert {"rows", "recovered_share_parameters", "seed", "commit", "machine"} <= set(read)
    assert set(read["rows"]) == set(names)
    row = read["rows"]["functional, 1 photo"]
    judged = {"denoising_loss", "face_similarity", "parameter_error", "parameter_error_read"}
    judged |= {"prompt_agreement", "seed_diversity", "seconds", "file_kb", "strength"}
    assert judged | {"fid", "kid", "step_ms", "copy_paste"} <= set(row)
    assert row["step_ms"] == read["rows"]["base"]["step_ms"] > 0  # a LoRA in its weights is free
    assert read["protocol"]["pictures_of_fid_and_kid"] == 4
    assert {"of_real", "paper", "seeds", "copy_paste"} <= set(read)
    assert "fid" not in read["per_identity"]["base"]
    dreambooth_steps = [
        read["rows"][f"DreamBooth, 8 photos, {steps} steps"]["seconds"] / steps for steps in (1, 2)
    ]
    assert dreambooth_steps[0] == pytest.approx(dreambooth_steps[1])  # one measurement for both
    assert len(read["per_identity"]["base"]["face_similarity"]) == 2


def test_rows_that_nobody_wants_are_not_trained(artefacts, plan, short, monkeypatch):
    for name in ("corpus_row", "refined"):
        monkeypatch.setattr(rows, name, lambda *_: 1 / 0)
    people = benchmark_people("validation", 1, plan.scenes)
    made = rows.build_rows(artefacts, people, DreamBoothRuns((), ()), [f"={HEADLINE}"])
    assert HEADLINE in [row.name for row in made]
    own = replace(artefacts, linear=linear_baselines(artefacts))
    for wanted in ("PCA", "mean LoRA", "refinement"):
        with pytest.raises(ZeroDivisionError):
            rows.build_rows(own, people, DreamBoothRuns((), ()), [wanted])


def test_dreambooth_is_trained_once(artefacts, plan, short):
    lines = []
    logged = replace(artefacts, log=lines.append, cache=artefacts.cache / "once")
    crowd = Experiment(logged, plan, "validation", 2).people
    first = rows.dreambooth_rows(logged, crowd, RUNS)
    count = len(lines)
    again = rows.dreambooth_rows(logged, crowd, RUNS)
    assert len(lines) == count == 3
    for one, two in zip(first, again, strict=True):
        assert one.name == two.name
        for name in one.weights:
            torch.testing.assert_close(one.weights[name].up, two.weights[name].up, atol=0, rtol=0)


def test_a_trial_is_drawn_once_for_the_same_weights_and_strength(artefacts, plan, monkeypatch):
    cached = replace(artefacts, cache=artefacts.cache / "drawn once")
    experiment = Experiment(cached, replace(plan, repeats=0), "validation", 1)
    features = cached.features(experiment.people.photos.images[:, :1])
    row = Row("some", rows.predict(cached.models["functional"], features))
    first, base = experiment.trial(row, 1.0), experiment.base()
    drawn = []
    monkeypatch.setattr(experiment.sampler, "pictures", lambda *a: drawn.append(a) or 1 / 0)
    again = experiment.trial(replace(row, name="other"), 1.0)
    assert again.row == "other"
    for one, two in ((first, again), (base, experiment.base())):
        for name, column in one.columns.items():
            torch.testing.assert_close(two.columns[name], column, atol=0, rtol=0)
    for changed, strength in ((row, 1.5), (replace(row, weights=row.weights.scaled(1.01)), 1.0)):
        with pytest.raises(ZeroDivisionError):
            experiment.trial(changed, strength)
    assert len(drawn) == 2


def test_choosing_strengths_on_a_tiny_world(artefacts, plan, short):
    experiment = Experiment(artefacts, replace(plan, repeats=0), "validation", 1)
    chosen = choose(experiment, ["functional, 1", "wrong"], QUIET, grid=(1.0, 2.0))
    assert "wrong photo" not in chosen
    assert "functional, 4 photos" not in chosen
    assert not any("DreamBooth" in name for name in chosen)
    scores = {float(name): value for name, value in chosen[HEADLINE]["scores"].items()}
    assert set(scores) == {1.0, 2.0}
    base, real = experiment.base(), experiment.real()[0]
    (row,) = [row for row in experiment.rows(DreamBoothRuns((), ())) if row.name == HEADLINE]
    drawn = [experiment.trial(row, strength) for strength in scores]
    assert [score(one, base, real) for one in drawn] == pytest.approx(list(scores.values()))
    assert chosen[HEADLINE]["strength"] == best_strength(drawn, scores, base)


def test_strengths_of_other_rows_stay(tmp_path):
    path = tmp_path / "strengths.json"
    assert read_choices(path) == {}
    old = {"a": {"strength": 1.5, "scores": {"1.5": 0.4}}}
    write_strengths(path, old)
    write_strengths(path, read_choices(path) | {"b": {"strength": 1.0, "scores": {}}})
    assert read_strengths(path) == {"a": 1.5, "b": 1.0}
    assert read_choices(path)["a"] == old["a"]


def test_rows_are_chosen_by_what_their_name_contains_or_is():
    assert rows.wanted_row("functional, 1 photo, sampled", None)
    assert rows.wanted_row("functional, 1 photo, sampled", ["sampled", "ridge"])
    assert not rows.wanted_row("functional, 1 photo, sampled", ["=functional, 1 photo"])
    assert rows.wanted_row("functional, 1 photo", ["=functional, 1 photo"])
    assert DreamBoothRuns().only(["8 photos, 300"]) == DreamBoothRuns((), (300,))
    assert DreamBoothRuns().only(["1 photo, 100", "100 steps"]) == DreamBoothRuns((100,), (100,))


def test_options():
    options = parse(["--quick", "--split", "validation", "--model", "no gate=a.safetensors"])
    assert options.quick
    assert options.split == "validation"
    assert options.model == ["no gate=a.safetensors"]
    assert parse([]).split == "test"
    assert plan_of(parse([])) == FULL_PLAN
    guided = plan_of(parse(["--quick", "--guidance", "2"]))
    assert guided == replace(QUICK_PLAN, guidance=2.0)
    with pytest.raises(SystemExit):
        parse(["--split", "train"])


def test_turned_factors_make_the_same_lora():
    g = torch.Generator().manual_seed(0)
    layer = LoRALayer(torch.randn(3, 4, 6, generator=g), torch.randn(3, 5, 4, generator=g), 4.0)
    again = compression.turned(LoRAWeights({"a": layer}), g)["a"]
    torch.testing.assert_close(again.up @ again.down, layer.up @ layer.down)
    assert not torch.allclose(again.down, layer.down, atol=0.1)


def test_compression_curve_on_a_tiny_world(artefacts, plan, short, monkeypatch):
    """PCA and both kinds give a row each; a PCA larger than the corpus is left out."""
    monkeypatch.setattr(compression, "LATENT_TOKENS", (1, 8))
    sizes = replace(networks.SMALL_LAE, latent_tokens=1, latent_dim=2)
    monkeypatch.setattr(compression.networks, "SMALL_LAE", sizes)
    small = replace(networks.SMALL_PAPER_LAE, latent_dim=2, basis_size=3)
    monkeypatch.setattr(compression.networks, "SMALL_PAPER_LAE", small)
    weights = rows.predict(
        artefacts.models["functional"],
        artefacts.features(benchmark_people("train", 7, ()).photos.images[:, :1]),
    )
    corpus = LoRACorpus(artefacts.layout, tuple(range(7)), weights)
    experiment = Experiment(artefacts, replace(plan, repeats=0), "validation", 1)
    original = Row("original", select(weights, [0]))
    table = compression.curve(experiment, original, corpus, 2, QUIET)
    trained = {f"{kind}, {n} numbers" for kind in ("structured", "conv1d") for n in (2, 16)}
    changed = {f"structured, 2 numbers, {change}" for change in compression.ABLATIONS}
    assert set(table) == trained | changed | {"pca, 2 numbers", "functional, 2 numbers"}
    exact = compression.columns(
        experiment,
        original.weights,
        original.weights,
        (experiment.base(), experiment.trial(original, 1.0)),
        2,
    )
    assert exact["kept_face_similarity"] == pytest.approx(1.0)
    assert exact["ratio"] == artefacts.layout.numel / 2
    assert exact["relative_error"] < 1e-3
