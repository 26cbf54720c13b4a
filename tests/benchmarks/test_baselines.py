"""Methods of other papers on a tiny random world: their formulas, their place in the table."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from rich.console import Console

from benchmarks.identity import rows as identity_rows
from benchmarks.identity import train_baselines
from benchmarks.identity.baselines import rows, textual_inversion, training
from benchmarks.identity.baselines.base import BaselineObjective, ConditionedPeople, Photos
from benchmarks.identity.baselines.hyperdreambooth import relaxed_config
from benchmarks.identity.baselines.ip_adapter import DecoupledAttention
from benchmarks.identity.baselines.photomaker import CLASS_WORD
from benchmarks.identity.baselines.registry import BASELINES
from benchmarks.identity.baselines.textual_inversion import (
    InversionConfig,
    LearnedPeople,
    learn_people,
)
from benchmarks.identity.drawing import PictureSampler, select
from benchmarks.identity.experiment import Experiment
from benchmarks.identity.people import RealPictures, benchmark_people
from benchmarks.prompts import PROMPTS
from difflora_core.demo.networks.text import tokenize, word_numbers
from difflora_core.lora.layout import TARGETS
from difflora_core.models.difflora import DiffLoRAConfig, DiffLoRAModel
from difflora_core.storage.checkpoint import load_model
from difflora_core.text.clip_pair import ClipPairText
from difflora_core.training.difflora.functional import PersonPictures
from difflora_core.vision.features import ImageFeatures

from .conftest import SIZES

SEEDS = (1, 2)
BUDGET = training.Budget(people=4, steps=2, batch=2, photos=2)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Validation of a picture or two."""
    monkeypatch.setattr(training, "JUDGED_PEOPLE", 2)
    monkeypatch.setattr(training, "JUDGED_BATCHES", 1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def photos(people: int, count: int, seed: int = 0) -> Photos:
    tokens = draw(people, count, SIZES.tokens, SIZES.token_dim, seed=seed + 2)
    points = torch.tensor([[20.0, 24], [44, 24], [32, 34], [24, 44], [40, 44]]) + draw(
        people, 5, 2, seed=seed + 3
    )
    face, image = draw(people, count, SIZES.face, seed=seed), draw(people, count, SIZES.image)
    return Photos(face, image, tokens, points)


def stirred(name: str, artefacts):
    """A baseline that does something: its weights are moved from where training starts."""
    method = training.new_baseline(name, artefacts.base, SIZES, 0).requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return method.requires_grad_(False)


def sampler(artefacts, plan, seeds=SEEDS) -> PictureSampler:
    return PictureSampler(artefacts.base, plan, seeds)


def trained_set(base, people: int = 4, pictures: int = 3) -> training.TrainingSet:
    count, side = people * pictures, base.unet.config.sample_size
    captions = [scene.caption() for scene in PROMPTS[:3]]
    features = ImageFeatures(
        draw(count, SIZES.face),
        torch.ones(count, dtype=torch.bool),
        draw(count, SIZES.image, seed=1),
        draw(count, SIZES.tokens, SIZES.token_dim, seed=2),
    )
    data = PersonPictures(
        latents=draw(count, base.unet.config.in_channels, side, side, seed=3),
        text=base.encode_prompts(captions),
        prompts=torch.arange(count) % 3,
        features=features,
        people=torch.arange(count).view(people, pictures),
    )
    return training.TrainingSet(data, photos(count, 1).keypoints)


@pytest.mark.parametrize("name", BASELINES)
def test_strength_zero_is_the_base_and_nothing_stays_attached(name, artefacts, plan):
    method, here = stirred(name, artefacts), sampler(artefacts, plan)
    plain = here.pictures()
    people = ConditionedPeople(method, photos(2, 1))
    torch.testing.assert_close(here.pictures(people, 0.0), plain, atol=0, rtol=0)
    assert not torch.allclose(here.pictures(people), plain, atol=1e-3)
    torch.testing.assert_close(here.pictures(), plain, atol=0, rtol=0)


@pytest.mark.parametrize("name", BASELINES)
def test_everybody_gets_the_own_photos_in_any_group(name, artefacts, plan):
    method, seen = stirred(name, artefacts), photos(2, 2)
    together = sampler(artefacts, plan).pictures(ConditionedPeople(method, seen))
    for k, seed in enumerate(SEEDS):
        own = Photos(*(getattr(seen, f)[k : k + 1] for f in vars(seen)))
        alone = sampler(artefacts, plan, [seed]).pictures(ConditionedPeople(method, own))
        torch.testing.assert_close(alone[0], together[k], atol=2e-4, rtol=0)
    swapped = Photos(*(getattr(seen, f).flip(0) for f in vars(seen)))
    other = sampler(artefacts, plan).pictures(ConditionedPeople(method, swapped))
    assert not torch.allclose(other, together, atol=1e-3)


def test_decoupled_attention_is_the_papers_formula(artefacts):
    """softmax(Q K / sqrt d) V + s softmax(Q K' / sqrt d) V', Eq. 5, in float64."""
    unet, strength = artefacts.base.unet, 0.7
    attention = DecoupledAttention(unet, (2,))
    name = attention.names[0]
    layer, own = unet.get_submodule(name.removesuffix(".processor")), attention.processors[0]
    with torch.no_grad():
        own.to_k_ip[0].weight.copy_(draw(*own.to_k_ip[0].weight.shape, seed=8) / 5)
    x, text = draw(1, 6, layer.to_q.in_features), draw(1, 5, layer.to_k.in_features, seed=1)
    image = draw(1, 2, layer.to_k.in_features, seed=2)

    def attend(query, key, value):
        heads = [
            t[0].double().unflatten(1, (layer.heads, -1)).transpose(0, 1)
            for t in (query, key, value)
        ]
        scores = heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5
        return (scores.softmax(-1) @ heads[2]).transpose(0, 1).flatten(1)

    query = layer.to_q(x)
    mixed = attend(query, layer.to_k(text), layer.to_v(text)) + strength * attend(
        query, own.to_k_ip[0](image), own.to_v_ip[0](image)
    )
    out = layer.to_out[0]
    wanted = mixed @ out.weight.double().T + out.bias.double()
    with torch.no_grad(), attention.attached(unet, strength):
        found = layer(x, encoder_hidden_states=(text, [image]))[0]
    torch.testing.assert_close(found.double(), wanted.detach(), atol=1e-5, rtol=1e-5)


def test_the_class_word_stands_where_photomaker_looks():
    for scene in PROMPTS:
        tokens = tokenize([scene.caption()])[0][0]
        assert tokens[CLASS_WORD : CLASS_WORD + 1].tolist() == word_numbers("person")


def test_photomaker_stacks_a_token_for_each_photo(artefacts):
    method = stirred("PhotoMaker", artefacts)
    text = artefacts.base.encode_prompts(["photo of a person"] * 2)
    seen = photos(2, 3)
    merged = method.text(text, method.person(seen), 1.0)
    assert merged.context.shape[1] == text.context.shape[1] + 2
    torch.testing.assert_close(merged.context[:, :CLASS_WORD], text.context[:, :CLASS_WORD])
    torch.testing.assert_close(
        merged.context[:, CLASS_WORD + 3 :], text.context[:, CLASS_WORD + 1 :]
    )
    first = Photos(seen.face[:, :1], seen.image[:, :1], seen.tokens[:, :1], seen.keypoints)
    alone = method.text(text, method.person(first), 1.0)
    torch.testing.assert_close(alone.context[:, CLASS_WORD], merged.context[:, CLASS_WORD])


def test_instantid_draws_points_and_none_without_a_face(artefacts):
    method, seen = stirred("InstantID", artefacts), photos(2, 1)
    hints = method.hints(seen.keypoints)
    red = hints[0, 0] * (hints[0, 1] < 0.2) * (hints[0, 2] < 0.2)
    y, x = (red > 0.9).nonzero().float().mean(0)
    torch.testing.assert_close(
        torch.stack([x, y]) + 0.5, 2 * seen.keypoints[0, 0], atol=1.5, rtol=0
    )
    assert not method.hints(torch.full_like(seen.keypoints, torch.nan)).any()


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_learns_and_is_kept_in_a_file(name, artefacts, tmp_path, plan):
    sets = (trained_set(artefacts.base), trained_set(artefacts.base))
    path = tmp_path / "method.safetensors"
    before = training.new_baseline(name, artefacts.base, SIZES, BUDGET.seed)
    found = training.train_baseline(name, artefacts.base, sets, BUDGET, path)
    assert 0 < found["validation"] < 100
    method = training.load_baseline(name, path, artefacts.base, SIZES)
    moved = [n for n, p in before.named_parameters() if not torch.equal(p, method.get_parameter(n))]
    trained = [n for n, p in before.named_parameters() if p.requires_grad]
    assert set(moved) <= set(trained)
    assert len(moved) > len(trained) / 2
    drawn = sampler(artefacts, plan).pictures(ConditionedPeople(method, photos(2, 1)))
    assert torch.isfinite(drawn).all()
    with pytest.raises(KeyError, match="another baseline"):
        method.load_learned({})
    again = training.train_baseline(name, artefacts.base, sets, BUDGET, path)
    assert again == found  # the run goes on from its end
    for parameter in artefacts.base.unet.parameters():
        assert parameter.grad is None


def test_every_method_sees_the_same_batches(artefacts):
    batches = trained_set(artefacts.base).batches(BUDGET)
    one, two = (batches(torch.Generator().manual_seed(4)) for _ in range(2))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], equal_nan=True)
    assert torch.equal(one["keypoints"], photos(12, 1).keypoints[one["pictures"]])
    objective = BaselineObjective(stirred("IP-Adapter", artefacts), artefacts.base)
    seen = one["pictures"]
    assert torch.equal(one["latents"], trained_set(artefacts.base).data.latents[seen])
    assert float(objective(one)[0]) == pytest.approx(float(objective(one)[1]["denoising"]))


@pytest.mark.parametrize("name", training.OURS)
def test_ours_and_its_ablations_train_on_the_same_terms(name, artefacts, tmp_path, monkeypatch):
    def new_model(seed, targets="attention", **parts):
        generator = torch.Generator().manual_seed(seed)
        layout = artefacts.base.layout("demo", artefacts.layout.rank, TARGETS[targets])
        return DiffLoRAModel(DiffLoRAConfig.demo(SIZES, **parts), layout, generator=generator)

    monkeypatch.setattr(training, "new_model", new_model)
    base, path = artefacts.base, tmp_path / "ours.safetensors"
    sets = (trained_set(base), trained_set(base))
    found = training.train_ours(name, base, sets, replace(BUDGET, steps=1), path)
    assert found["validation"] > 0
    sources = training.OURS[name].get("sources", ("face", "image", "tokens"))
    made = load_model(path)
    assert made.config.mif.sources == sources
    assert any(".ff." in layer.name for layer in made.layout) == ("feed-forward" in name)


def test_words_of_people_start_at_person_and_keep_apart(artefacts, text):
    base, captions = artefacts.base, ["photo of a person, smiling", "cartoon of a person"]
    made = LearnedPeople(base, text, 3)
    owner = torch.tensor([0, 2])
    encoded = made.encode(base, captions, owner, 1.0)
    plain = text.encode(captions, {})
    torch.testing.assert_close(encoded.context, plain.context)
    encoded.context.square().sum().backward()
    for shift in made.shifts:
        assert shift.grad[[0, 2]].abs().sum(1).gt(0).all()
        assert not shift.grad[1].any()
    with torch.no_grad():
        made.shifts[0][2] += 1
    moved = made.encode(base, captions, owner, 1.0)
    torch.testing.assert_close(moved.context[0], encoded.context[0])
    assert not torch.allclose(moved.context[1], encoded.context[1])
    torch.testing.assert_close(made.encode(base, captions, owner, 0.0).context, plain.context)


def test_words_of_people_are_learned_once(artefacts, text: ClipPairText, tmp_path):
    side, channels = 64, 3
    pictures = RealPictures(
        draw(2, 2, side, side, channels).sigmoid(), [["photo of a person"] * 2] * 2
    )
    config = InversionConfig(steps=2, batch=1)
    learned = learn_people(artefacts.base, text, pictures, config, tmp_path)
    assert all(shift.abs().sum(1).gt(0).all() for shift in learned.shifts)
    again = learn_people(artefacts.base, text, pictures, config, tmp_path)
    assert all(map(torch.equal, learned.shifts, again.shifts))
    assert again.seconds == learned.seconds > 0  # of the learning, not of the reading
    assert len(list(tmp_path.iterdir())) == 1
    assert learned.kilobytes == sum(len(v) for v in learned.start) * 2 / 1024


def test_relaxed_refinement_doubles_the_rank_and_keeps_the_start(artefacts):
    people = benchmark_people("validation", 2, ())
    guess = identity_rows.predict(
        artefacts.models["functional"], artefacts.features(people.photos.images[:, :1])
    )
    pictures = identity_rows.first_photos(people, 1)
    config = replace(relaxed_config(4, steps=1), samples_per_step=1, learning_rate=1e-9)
    made = identity_rows.refined(artefacts, people, guess, pictures, config)
    for name, layer in made.layers.items():
        assert layer.rank == 8
        own = guess[name]
        wanted = own.up @ own.down * own.alpha / own.rank
        torch.testing.assert_close(
            layer.up @ layer.down * layer.alpha / 8, wanted, atol=1e-5, rtol=0
        )
    assert made.batch_shape == (2,)
    assert select(made, [1]).batch_shape == (1,)


def test_rows_of_baselines_stand_in_the_table(artefacts, plan, text, tmp_path, monkeypatch):
    own = replace(artefacts, cache=tmp_path)
    sets = (trained_set(own.base), trained_set(own.base))
    path = training.file_of("IP-Adapter", BUDGET, tmp_path / "baselines", own.base_hash)
    training.train_baseline("IP-Adapter", own.base, sets, BUDGET, path)
    monkeypatch.setattr(textual_inversion, "text_encoders", lambda: text)
    lines = []
    experiment = Experiment(replace(own, log=lines.append), plan, "validation", 2)
    wanted = ["IP-Adapter", "PhotoMaker", "Textual Inversion, 1"]
    made = rows.baseline_rows(experiment.artefacts, experiment.people, BUDGET, wanted)
    assert [row.name for row in made] == [
        "IP-Adapter, 1 photo",
        "IP-Adapter, 4 photos",
        "Textual Inversion, 1 photo, 2 steps",
    ]
    assert lines == ["left out: PhotoMaker, run make bench name=train_baselines"]
    for row in made[0], made[2]:
        first = experiment.trial(row, 1.0).means()
        assert {"step_ms", "file_kb", "seconds", "fid", "face_similarity"} <= set(first)
        assert experiment.trial(row, 1.0).means()["face_similarity"] == first["face_similarity"]
        assert experiment.trial(row, 0.5).means()["fid"] != first["fid"]
    assert made[0].megabytes == path.stat().st_size / 1e6


def test_the_command_trains_what_is_missing(artefacts, tmp_path, monkeypatch):
    own, trained = replace(artefacts, cache=tmp_path), []
    monkeypatch.setattr(train_baselines, "load_artefacts", lambda: own)
    monkeypatch.setattr(train_baselines, "training_set", lambda base, *_: trained_set(base))

    def train(name, base, sets, budget, path, progress):
        trained.append(name)
        return training.train_baseline(name, base, sets, budget, path, progress)

    monkeypatch.setattr(train_baselines, "train_baseline", train)
    run = partial(train_baselines.train_all, BUDGET, ["PhotoMaker"], Console(quiet=True))
    first, again = run(), run()
    assert trained == ["PhotoMaker"]
    assert first == again
    assert {"validation", "seconds", "mb"} <= set(first["PhotoMaker"])
    assert first["base"]["validation"] > 0
