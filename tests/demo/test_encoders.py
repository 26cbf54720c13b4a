"""The shipped encoders and judges, on people that none of them was trained on.

Only the splits train, validation and judge appear here; test people are for the final table.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from difflora_core.demo import paths
from difflora_core.demo.networks import (
    clip_vision,
    detector_targets,
    faceless,
    judges,
    recogniser,
    views,
)
from difflora_core.demo.networks.views import Schedule
from difflora_core.demo.world.identities import PARAMETERS, SPLITS
from difflora_core.demo.world.pool import pair_pool, portrait_pool
from difflora_core.errors import CheckpointError, InterruptedTraining
from difflora_core.vision.face_encoder import InsightFaceEncoder
from difflora_core.vision.preprocess import align_face, clip_pixels

ARTEFACTS = paths.ARTEFACTS
FACES = ARTEFACTS / "insightface" / "demo_faces"
JUDGES = ARTEFACTS / "judges"
CLIP = ARTEFACTS / clip_vision.FILE_NAME

# None of the validation people that the recipes measure themselves on.
START = 5000


@pytest.fixture(scope="module")
def portraits():
    return portrait_pool("validation", 12, 4, start=START)


@pytest.fixture(scope="module")
def faces():
    return InsightFaceEncoder(FACES)


@pytest.fixture(scope="module")
def jury():
    return judges.load_judges(JUDGES)


def test_splits_are_disjoint():
    seen = [seed for split in SPLITS.values() for seed in (split.start, split.stop - 1)]
    assert seen == sorted(seen)
    assert len(set(seen)) == 2 * len(SPLITS)


def test_insightface_finds_every_portrait(portraits, faces):
    found = [faces.detect(image.float() / 255) for image in portraits.images]
    assert [len(each) for each in found] == [1] * len(portraits)
    errors = torch.stack([each[0].keypoints for each in found]) - portraits.keypoints[:, 0]
    distances = errors.norm(dim=-1)  # pixels of the 64 px picture
    assert distances.mean() < 1.5
    assert distances.max() < 6
    boxes = torch.stack([each[0].box for each in found])
    assert (boxes - portraits.boxes[:, 0]).abs().mean() < 2


def test_insightface_finds_both_people(faces):
    pool = pair_pool("validation", 6, 6, start=START)
    for image, points in zip(pool.images, pool.keypoints, strict=True):
        found = sorted(faces.detect(image.float() / 255), key=lambda face: float(face.box[0]))
        assert len(found) == 2
        for face, truth in zip(found, points, strict=True):
            assert (face.keypoints - truth).norm(dim=1).mean() < 4


def test_no_face_on_empty_pictures(faces):
    nobody = faceless.empty_pictures(20, torch.Generator().manual_seed(99))
    assert sum(len(faces.detect(image)) for image in nobody) <= 1


def test_recogniser_knows_people(portraits, faces):
    found = [faces.detect(image.float() / 255)[0].embedding for image in portraits.images]
    figures = recogniser.recognition_figures(torch.stack(found), portraits.identities)
    assert figures["same"] > figures["different"] + 0.3
    assert figures["rank1"] > 0.8


def test_batched_alignment_is_align_face(portraits):
    planes, points = views.as_planes(portraits.images[:3]), portraits.keypoints[:3, 0]
    batch = recogniser.align_batch(planes, points)
    for k in range(3):
        one = align_face(planes[k].permute(1, 2, 0), points[k]).permute(2, 0, 1)
        torch.testing.assert_close(batch[k], one, atol=1e-4, rtol=0)


def test_views_move_points_with_pixels():
    planes = torch.zeros(1, 3, 64, 64)
    planes[:, :, 20, 30] = 1
    matrices = views.square_matrices(torch.tensor([[32.0, 24.0]]), torch.tensor([32.0]), 64)
    view = views.warp(planes, matrices, 64)[0, 0]
    point = views.map_points(matrices, torch.tensor([[[30.5, 20.5]]]))[0, 0]
    weight = view / view.sum()
    centre = torch.stack(
        [(weight.sum(0) * torch.arange(64)).sum(), (weight.sum(1) * torch.arange(64)).sum()]
    )
    torch.testing.assert_close(point, centre, atol=0.02, rtol=0)


def test_person_sampler_pairs_people():
    identities = torch.tensor([5, 7, 5, 9, 7, 9, 5])
    sampler = views.PersonSampler(identities, torch.Generator().manual_seed(0))
    for _ in range(20):
        index = sampler.draw(3)
        assert (identities[index[:3]] == identities[index[3:]]).all()
        assert (index[:3] != index[3:]).all()
        assert len(set(identities[index[:3]].tolist())) == 3


def test_detector_targets_decode_to_the_face():
    boxes = torch.tensor([[[30.0, 40.0, 64.0, 80.0]]])
    points = torch.tensor([[[40.0, 55, 54, 55, 47, 62, 41, 70, 53, 70]]])
    target = detector_targets.assign(boxes, points, 128, 1)
    assert 1 <= int(target.positive.sum()) <= 4
    for _, y, x in target.positive.nonzero().tolist():
        corner = torch.tensor([x, y]) * 16.0
        left, top, right, bottom = (target.boxes[0, y, x] * 16).tolist()
        assert [corner[0] - left, corner[1] - top] == [30, 40]
        assert [corner[0] + right, corner[1] + bottom] == [64, 80]
        decoded = corner + (target.points[0, y, x] * 16).view(5, 2)
        torch.testing.assert_close(decoded, points[0, 0].view(5, 2))
    assert not detector_targets.assign(boxes, points, 128, 2).positive.any()


def test_clip_vision_reads_people(portraits):
    model, config, _ = clip_vision.load_clip_vision(CLIP)
    pixels = clip_pixels(portraits.images.float() / 255, config["image_size"])
    with torch.no_grad():
        pooled = model(pixel_values=pixels).image_embeds
    unit = F.normalize(pooled - pooled.mean(0), dim=1)
    same = portraits.identities[:, None] == portraits.identities[None]
    cosines = unit @ unit.T
    assert (
        cosines[same & ~torch.eye(len(unit), dtype=torch.bool)].mean() > cosines[~same].mean() + 0.2
    )


@pytest.mark.comfy
def test_clip_vision_is_the_same_in_comfyui(portraits, comfyui):
    from comfy.clip_vision import ClipVisionModel

    model, config, tensors = clip_vision.load_clip_vision(CLIP)
    images = portraits.images[:3].float() / 255
    host = ClipVisionModel(config)
    missing, unexpected = host.load_sd(tensors)
    assert (list(missing), list(unexpected)) == ([], [])
    with torch.no_grad():
        theirs = host.encode_image(images)
        pixels = clip_pixels(images, config["image_size"])
        ours = model(pixel_values=pixels, output_hidden_states=True)
    torch.testing.assert_close(theirs["image_embeds"], ours.image_embeds, atol=1e-3, rtol=1e-3)
    penultimate = theirs["penultimate_hidden_states"]
    torch.testing.assert_close(penultimate, ours.hidden_states[-2], atol=1e-3, rtol=1e-3)


def test_judges_on_strangers(portraits, jury):
    figures = judges.judge_figures(jury, portraits)
    assert figures["embedder"]["same"] > figures["embedder"]["different"] + 0.3
    assert sum(figures["parameters"].values()) / len(PARAMETERS) > 0.5
    for name in ("look", "background", "shirt", "item"):
        assert figures["attributes"][name] > 0.85


def test_judges_take_other_sizes(portraits, jury):
    images = portraits.images[:2].float() / 255
    large = images.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert (jury.embed(images) * jury.embed(large)).sum(1).min() > 0.9
    assert jury.parameters(large).shape == (2, len(PARAMETERS))


@pytest.mark.parametrize("name", list(judges.RECIPES))
def test_judge_recipe_repeats_itself(name, tmp_path):
    pool = portrait_pool("judge", 6, 3, start=9000)
    recipe = judges.JudgeRecipe(
        outputs=judges.RECIPES[name].outputs, widths=(8, 8, 8, 8), people=4, schedule=Schedule(3)
    )
    runs = [judges.train_judge(name, pool, recipe, tmp_path, tmp_path / run) for run in "ab"]
    for a, b in zip(runs[0].state_dict().values(), runs[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_stopped_training_of_a_network_goes_on_as_if_nothing_had_been(tmp_path):
    """Batch norms and draws from one generator included."""
    pool = portrait_pool("judge", 6, 3, start=9000)
    recipe = replace(judges.CLASSIFIER, widths=(8, 8, 8, 8), people=4, schedule=Schedule(25))

    def trained(folder, stop):
        training = judges.JudgeTraining("attributes", pool, recipe)

        def progress(step, steps, metrics):
            if stop and step == 20:
                raise InterruptedTraining("enough")

        training.run(tmp_path / folder, progress)
        return training.model.state_dict()

    straight = trained("a", stop=False)
    with pytest.raises(InterruptedTraining, match="step 20"):
        trained("b", stop=True)
    resumed = trained("b", stop=False)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    other = judges.JudgeTraining("attributes", pool, replace(recipe, shift=3.0))
    with pytest.raises(CheckpointError, match="another training"):
        other.run(tmp_path / "b")


def test_no_face_in_noise_or_in_a_disc(faces):
    draw = torch.Generator().manual_seed(98)
    white = [torch.rand(side, side, 3, generator=draw) for side in (64, 96, 128, 256)] * 3
    nobody = [*faceless.noise_pictures(20, 64, draw), *faceless.disc_pictures(20, 64, draw), *white]
    assert sum(len(faces.detect(image)) for image in nobody) <= 1


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_portrait_that_lies_or_stands_on_its_head_is_the_same_person(portraits, faces, turns):
    """Its picture is turned until an upright face is found; the surer one counts."""
    same = []
    for image in portraits.images[::3]:
        (upright,), found = faces.detect(image), faces.detect(image.rot90(turns))
        cosines = [torch.cosine_similarity(f.embedding, upright.embedding, 0) for f in found]
        same.append(max(cosines, default=torch.tensor(0.0)) > 0.9)
    assert torch.tensor(same).float().mean() >= 0.9
