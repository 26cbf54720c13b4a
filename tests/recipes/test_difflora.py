"""Functional recipe and the face reader that judges it in training, on a tiny base."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.base_model.protocol import TextCondition
from difflora_core.diffusion.objective import abar_at, add_noise, training_target
from difflora_core.errors import ConfigError
from difflora_core.models.difflora import DiffLoRAConfig, DiffLoRAModel
from difflora_core.models.dit import DiTConfig
from difflora_core.models.face_reader import FaceReader, FaceReaderConfig
from difflora_core.models.lae.config import LAEConfig
from difflora_core.models.layers import DrawnFrom
from difflora_core.models.mif import MIFConfig
from difflora_core.models.predictor import PredictorConfig
from difflora_core.training.average import Average
from difflora_core.training.difflora import face_reader
from difflora_core.training.difflora import functional as difflora
from difflora_core.training.loop import LoopConfig
from difflora_core.training.losses import NoisedBatch, denoise, denoising_error
from difflora_core.vision.features import ImageFeatures

PEOPLE, PICTURES, FACE = 24, 4, 6
CONFIG = difflora.FunctionalConfig(batch=16, photos=2)
LOOP = LoopConfig(steps=12, learning_rate=1e-2, warmup=2, log_every=4, ema=0.5)


@pytest.fixture
def model(base):
    config = DiffLoRAConfig.build(
        MIFConfig(FACE, 5, 4, 2, width=8, tokens=2, heads=2),
        PredictorConfig(width=16, depth=1),
        DiTConfig(width=16, depth=1, heads=2),
        LAEConfig(latent_tokens=2, latent_dim=4, width=8, depth=1, heads=2, basis_size=4),
    )
    return DiffLoRAModel(config, base.layout("tiny", 2), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reader():
    with DrawnFrom(torch.Generator().manual_seed(3)):
        return FaceReader(FaceReaderConfig(channels=4, face=FACE, width=8, grid=1))


@pytest.fixture
def data(base):
    """People whose face feature shifts their latents, so that there is a person to learn."""
    g = torch.Generator().manual_seed(5)
    who = torch.randn(PEOPLE, FACE, generator=g)
    count = PEOPLE * PICTURES
    seen = who.repeat_interleave(PICTURES, 0)
    noisy = seen + 0.1 * torch.randn(count, FACE, generator=g)
    shift = torch.randn(FACE, 4 * 4 * 4, generator=g) / FACE**0.5
    latents = (seen @ shift).unflatten(1, (4, 4, 4)) + 0.2 * torch.randn(
        count, 4, 4, 4, generator=g
    )
    features = ImageFeatures(
        noisy, torch.ones(count, dtype=torch.bool), noisy[:, :5], noisy[:, None, :4].repeat(1, 2, 1)
    )
    return difflora.PersonPictures(
        latents,
        base.encode_prompts(["a", "b"]),
        torch.arange(count) % 2,
        features,
        torch.arange(count).reshape(PEOPLE, PICTURES),
    )


def one_batch(data, model):
    return difflora.person_batches(data, model, CONFIG, 1000)(torch.Generator().manual_seed(1))


def test_an_exact_prediction_has_no_error_and_gives_back_the_clean_latents(base, monkeypatch):
    g = torch.Generator().manual_seed(2)
    clean, noise = torch.randn(2, 5, 4, 4, 4, generator=g)
    timesteps = torch.tensor([0, 10, 400, 700, 990])
    abar = abar_at(base.alphas_cumprod, timesteps, clean)
    truth = training_target(clean, noise, abar, base.prediction_type)
    batch = NoisedBatch(clean, noise, timesteps, base.encode_prompts(["a"] * 5))

    def exact(noisy, steps, text):
        torch.testing.assert_close(noisy, add_noise(clean, noise, abar))
        return truth

    monkeypatch.setattr(base, "predict", exact)
    made = denoise(base, batch)
    assert made.error.max() == 0
    torch.testing.assert_close(made.estimate, clean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.abar, base.alphas_cumprod[timesteps])


def test_likeness_error_is_the_cosine_distance_and_silent_about_unknown_faces(reader):
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    seen = reader(latents)
    torch.testing.assert_close(seen.norm(dim=-1), torch.ones(3))
    centroids = torch.stack([seen[0], -seen[1], torch.zeros(FACE)])
    error = face_reader.likeness_error(reader, latents, centroids)
    torch.testing.assert_close(error, torch.tensor([0.0, 2.0, 1.0]), atol=1e-6, rtol=0)


def test_centroids_are_unit_means_over_found_faces():
    face = torch.tensor([[3.0, 0.0], [0.0, 5.0], [9.0, 9.0], [1.0, 1.0]])
    found = torch.tensor([True, True, False, False])
    nothing = torch.zeros(4, 1)
    features = ImageFeatures(face, found, nothing, nothing[:, None])
    centroids = face_reader.face_centroids(features, torch.tensor([[0, 1], [2, 3]]))
    root = 0.5**0.5
    torch.testing.assert_close(centroids, torch.tensor([[root, root], [0.0, 0.0]]))


def test_likeness_is_added_to_the_other_losses_with_its_weight(base, model, reader, data):
    batch = one_batch(data, model)
    plain = difflora.FunctionalObjective(model, base, CONFIG)(batch)[0]
    weighted = replace(CONFIG, likeness=0.25)
    total, metrics = difflora.FunctionalObjective(model, base, weighted, reader)(batch)
    torch.testing.assert_close(total, plain + 0.25 * metrics["unlike"])
    # at initialisation the LoRA is zero: the estimate is the untouched base's
    text = type(data.text)(batch["context"], batch["pooled"])
    noised = NoisedBatch(batch["latents"], batch["noise"], batch["timesteps"], text)
    made = denoise(base, noised)
    cosine = (reader(made.estimate) * batch["centroids"]).sum(-1)
    expected = ((1 - cosine) * base.alphas_cumprod[batch["timesteps"]].sqrt()).mean()
    torch.testing.assert_close(metrics["unlike"], expected)
    torch.testing.assert_close(
        metrics["denoising"], denoising_error(base, noised, "uniform").mean()
    )


def test_the_face_is_read_where_the_drawn_picture_has_it_and_the_model_learns_of_it(
    base, model, data
):
    """The same noise with other places of the faces: another likeness, another gradient."""
    with DrawnFrom(torch.Generator().manual_seed(3)):
        cutting = FaceReader(FaceReaderConfig(channels=4, face=FACE, width=8, grid=1, crop=4))
    gradients, unlike = [], []
    for left in (0.0, 0.5):
        boxes = torch.tensor([left, 0.25, left + 0.5, 0.75]).repeat(len(data.latents), 1)
        batch = one_batch(replace(data, boxes=boxes), model)
        assert torch.equal(batch["boxes"], boxes[batch["pictures"]])
        for weight in (0.0, 1.0):
            config = replace(CONFIG, likeness=weight)
            model.zero_grad()
            loss, metrics = difflora.FunctionalObjective(model, base, config, cutting)(batch)
            loss.backward()
            found = [p.grad for p in model.parameters() if p.grad is not None]
            gradients.append(torch.cat([grad.flatten() for grad in found]))
        unlike.append(float(metrics["unlike"]))
    ours = gradients[1] - gradients[0], gradients[3] - gradients[2]
    assert torch.equal(gradients[0], gradients[2])
    assert min(float(g.norm()) for g in ours) > 1e-6
    assert float((ours[0] - ours[1]).norm()) > 1e-6
    assert unlike[0] != unlike[1]


def test_only_the_road_from_photo_to_lora_is_trained(base, model, reader, data):
    objective = difflora.FunctionalObjective(model, base, CONFIG, reader)
    objective(one_batch(data, model))[0].backward()
    with_gradient = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert "lae" in with_gradient
    frozen = [*reader.parameters(), *base.unet.parameters(), *model.dit.parameters()]
    frozen += list(model.lae.encoder.parameters())
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_the_person_drawn_is_never_the_photo_seen(data, model):
    batch = one_batch(data, model)
    faces = data.features.face
    for row in range(CONFIG.batch):
        drawn = (data.latents - batch["latents"][row]).abs().flatten(1).sum(1).argmin()
        seen = [(faces - face).abs().sum(1).argmin() for face in batch["face"][row]]
        assert drawn not in seen
        assert {int(s) // PICTURES for s in seen} == {int(drawn) // PICTURES}


def test_it_learns_and_a_resumed_run_is_the_same_run(base, model, reader, data, tmp_path):
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    course = LoopConfig(steps=150, learning_rate=1e-2, warmup=5, log_every=150)
    face_reader.fit(reader, data, course, tmp_path / "reader")
    config = replace(CONFIG, likeness=3.0)
    objective = difflora.FunctionalObjective(model, base, config, reader)
    draw = difflora.person_batches(data, model, config, len(base.alphas_cumprod))
    batches = [draw(torch.Generator().manual_seed(k)) for k in range(16)]

    @torch.no_grad()
    def losses():
        """Means over many batches: in a single one, chance outweighs what was learned."""
        measured = [objective(batch) for batch in batches]
        rows = [[total, metrics["denoising"], metrics["unlike"]] for total, metrics in measured]
        return torch.tensor(rows).mean(0)

    before = losses()
    # Slow and averaged: at higher rates the kind of processor decides whether likeness rises.
    course = replace(LOOP, steps=150, learning_rate=1e-3, decay=0.8, ema=0.95)
    difflora.fit(objective, data, course, tmp_path / "long")
    assert (losses() < 0.97 * before).all()

    def run(folder, stop_at=None):
        model.load_state_dict(start)

        def stop(step, total, metrics):
            if step == stop_at:
                raise KeyboardInterrupt

        difflora.fit(objective, data, LOOP, tmp_path / folder, stop)

    run("straight")
    straight = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Exception, match="run it again"):
        run("broken", stop_at=8)
    model.load_state_dict(start)
    difflora.fit(objective, data, LOOP, tmp_path / "broken")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, straight[name], msg=name)


def test_the_reader_learns_to_read_faces(reader, data, tmp_path):
    loop = LoopConfig(steps=60, learning_rate=1e-2, warmup=5, log_every=60)
    made = face_reader.fit(reader, data, loop, tmp_path)
    assert made["cosine"] < 1
    centroids = face_reader.face_centroids(data.features, data.people)
    error = face_reader.likeness_error(
        reader, data.latents, centroids.repeat_interleave(PICTURES, 0)
    )
    assert error.mean() < 0.15


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"photos": 0}, {"likeness": -1.0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="must be"):
        difflora.FunctionalConfig(**wrong)


@given(st.lists(st.integers(2, PICTURES), min_size=PEOPLE, max_size=PEOPLE), st.integers(0, 10**6))
def test_people_with_fewer_pictures_are_drawn_from_their_own(counts, seed):
    """A photo to see is never the picture to draw, nor anybody else's."""
    rows = [list(range(PICTURES * k, PICTURES * k + n)) for k, n in enumerate(counts)]
    table = torch.tensor([own + [-1] * (PICTURES - len(own)) for own in rows])
    count = PEOPLE * PICTURES
    marks = torch.arange(count, dtype=torch.float32)
    features = ImageFeatures(
        marks[:, None].expand(-1, FACE),
        torch.ones(count, dtype=torch.bool),
        marks[:, None].expand(-1, 5),
        marks[:, None, None].expand(-1, 2, 4),
    )
    latents = marks[:, None, None, None].expand(-1, 4, 2, 2)
    text = TextCondition(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    sizes = marks[:, None].expand(-1, 6)
    data = difflora.PersonPictures(
        latents, text, torch.zeros(count, dtype=torch.long), features, table, sizes
    )
    sized = SimpleNamespace(
        config=SimpleNamespace(
            mif=SimpleNamespace(width=3), lae=SimpleNamespace(latent_tokens=1, latent_dim=1)
        )
    )
    draw = difflora.person_batches(data, sized, replace(CONFIG, batch=8, photos=PICTURES), 1000)
    batch = draw(torch.Generator().manual_seed(seed))
    for target, seen, mask in zip(
        batch["latents"][:, 0, 0, 0], batch["face"][:, :, 0], batch["photo_mask"], strict=True
    ):
        person = int(target) // PICTURES
        shown = seen[mask].int().tolist()
        assert shown
        assert len(set(shown)) == len(shown)
        assert set(shown) <= set(rows[person]) - {int(target)}
        assert int(target) in rows[person]
    assert torch.equal(batch["time_ids"][:, 0], batch["latents"][:, 0, 0, 0])


def test_a_person_with_one_picture_cannot_be_drawn_from_another(data, model):
    alone = replace(data, people=torch.tensor([[0, 1], [2, -1]]))
    with pytest.raises(ConfigError, match="at least two pictures"):
        difflora.person_batches(alone, model, CONFIG, 1000)
    with pytest.raises(ConfigError, match="needs a picture"):
        replace(data, people=torch.tensor([[0, 1], [-1, -1]]))


def test_validation_keeps_the_best_weights_and_changes_nothing_else(model, base, data, tmp_path):
    """Judging draws from a generator of its own: the course is that of the run without it."""
    loop = replace(LOOP, steps=4, validate_every=2, log_every=1, ema=0.0)
    other = copy.deepcopy(model)
    plain = difflora.FunctionalObjective(model, base, CONFIG)
    difflora.fit(plain, data, loop, tmp_path / "plain")
    judged = difflora.FunctionalObjective(other, base, CONFIG)
    few = replace(data, people=data.people[:3])
    result = difflora.fit(judged, data, loop, tmp_path / "judged", validation=few)
    assert result["best_step"] in (2.0, 4.0)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "events.jsonl").open()]
        for name in ("plain", "judged")
    ]
    assert losses[0] == losses[1]
    assert result["best_step"] != 4.0 or all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_an_average_in_the_computers_memory_is_the_same(model):
    here, there = Average(model, 0.9), Average(model, 0.9, torch.device("cpu"))
    for _ in range(2):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        here.update(model)
        there.update(model)
    assert all(torch.equal(here.weights[n], there.weights[n]) for n in here.weights)
    now = dict(model.named_parameters())
    assert not any(torch.equal(now[n], weight) for n, weight in here.weights.items())
