"""The stages that call the command line make what the library makes of the same pictures."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from difflora_core.commands import train
from difflora_core.commands.encoders import file_digest
from difflora_core.commands.main import plain_console
from difflora_core.commands.networks import network_config
from difflora_core.data.encodings import Latents
from difflora_core.demo import paths
from difflora_core.demo.build import people, stages_lora
from difflora_core.demo.build.features import demo_encoders
from difflora_core.demo.examples import DREAMBOOTH
from difflora_core.demo.networks.base import demo_layout, load_base
from difflora_core.demo.networks.vae import encode_pool
from difflora_core.demo.world.pool import portrait_pool
from difflora_core.lora.layout import TARGETS
from difflora_core.models.difflora import DiffLoRAModel
from difflora_core.models.face_reader import FaceReader, FaceReaderConfig
from difflora_core.models.layers import DrawnFrom
from difflora_core.storage.checkpoint import load_model, save_model
from difflora_core.storage.lora_file import read_lora_file
from difflora_core.training.difflora import face_reader, functional, latent_dit
from difflora_core.training.difflora.functional import PersonPictures
from difflora_core.vision.face_choice import FaceOptions
from difflora_core.vision.features import extract_features

PICTURES = 3


def pool(split, count):
    return portrait_pool(split, count, PICTURES)


def shorter(loop):
    return replace(loop, steps=3, warmup=1)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The demo's settings on few people, with short courses; everything lies in a folder."""
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr(stages_lora, "READER_LOOP", shorter(stages_lora.READER_LOOP))
    monkeypatch.setattr(stages_lora, "FUNCTIONAL_LOOP", shorter(stages_lora.FUNCTIONAL_LOOP))
    few = replace(stages_lora.FUNCTIONAL, batch=4)
    monkeypatch.setattr(stages_lora, "FUNCTIONAL", few)
    course = stages_lora.DISTRIBUTION
    monkeypatch.setattr(
        stages_lora, "DISTRIBUTION", replace(course, loop=shorter(course.loop), batch=4)
    )


def by_the_library(base, portraits):
    """What the stages called before: pictures of a pool as the functional recipe takes them."""
    images = portraits.images.float() / 255
    features = extract_features(images, *demo_encoders(), FaceOptions(on_missing="error")).features
    # A dataset keeps unit faces, and whoever reads them makes them unit again: the last bit.
    face = torch.stack([F.normalize(own, dim=0) for own in features.face])
    torch.testing.assert_close(face, features.face, rtol=0, atol=1e-7)
    captions = [scene.caption() for scene in portraits.scenes]
    prompts = list(dict.fromkeys(captions))
    return PersonPictures(
        latents=torch.cat(
            [base.encode_images(image[None]).contiguous() for image in images]
        ).half(),
        text=base.encode_prompts(prompts),
        prompts=torch.tensor([prompts.index(caption) for caption in captions]),
        features=replace(features, face=face, image_tokens=features.image_tokens.half()),
        people=torch.arange(len(images)).reshape(-1, PICTURES),
    )


def photo_latents(model, data):
    count = len(data.people)
    return latent_dit.LatentExamples(
        data.features, latent_dit.photo_latents(model, data.features, count)
    )


def test_model_file_and_yardstick_edit_the_same_layers():
    """What ships is what its stage makes, and DreamBooth is given as many layers to learn with."""
    settings, shipped = stages_lora.functional_settings(), load_model(paths.DIFFLORA).layout
    assert shipped == demo_layout(settings.rank, settings.targets)
    yardstick = demo_layout(DREAMBOOTH.rank, DREAMBOOTH.targets)
    assert yardstick == shipped
    assert len(read_lora_file(paths.OLD_LORA).tensors) == 3 * len(shipped)  # down, up, alpha


def test_train_makes_the_model_that_the_library_makes(small, tmp_path):
    base, pools = load_base(paths.BASE), [pool("train", 5), pool("validation", 2)]
    names = stages_lora.TRAIN, stages_lora.VALIDATION
    datasets = [people.prepared(*own) for own in zip(names, pools, strict=True)]
    sets = [by_the_library(base, portraits) for portraits in pools]
    for made, data, portraits in zip(datasets, sets, pools, strict=True):
        pictures = torch.stack([row.picture for row in made])
        assert torch.equal((pictures * 255).round().to(torch.uint8), portraits.images)
        latents = torch.stack([Latents(made).read(row) for row in range(len(made))])
        assert torch.equal(latents, data.latents)
        # The base was trained on latents that the VAE made in bfloat16.
        assert (latents - encode_pool(base.vae, portraits.images)).abs().mean() < 0.02
        features = stages_lora.people_of(names[datasets.index(made)], lambda *_: None).pictures
        for name in ("face", "image", "image_tokens"):
            theirs, ours = (getattr(own.features, name) for own in (features, data))
            assert torch.equal(theirs, ours), name
    settings = stages_lora.functional_settings()
    train.run(settings, plain_console())
    with DrawnFrom(torch.Generator().manual_seed(settings.seed)):
        reader = FaceReader(FaceReaderConfig(8, 128))
    face_reader.fit(reader, sets[0], settings.likeness, tmp_path / "library" / "reader")
    sizes = sets[0].features.sizes
    digest = file_digest(paths.CLIP_VISION)[:12]
    config = network_config(
        sizes,
        False,
        face_encoder="demo_faces/rec_demo.onnx",
        image_encoder=f"clip_vision.safetensors {digest}",
    )
    generator = torch.Generator().manual_seed(settings.seed)
    layout = base.layout("demo", settings.rank, TARGETS[settings.targets])
    model = DiffLoRAModel(config, layout, generator=generator)
    objective = functional.FunctionalObjective(model, base, settings.functional, reader)
    folder = tmp_path / "library" / "functional"
    functional.fit(objective, sets[0], settings.functional_loop, folder)
    examples = [photo_latents(model, data) for data in sets]
    latent_dit.fit(model, examples[0], settings.dit, folder / "dit", examples[1])
    save_model(model, tmp_path / "library" / "model.safetensors", torch.float16)
    made = load_model(tmp_path / "runs" / "functional" / "difflora-model.safetensors")
    theirs = load_model(tmp_path / "library" / "model.safetensors")
    assert made.config == theirs.config
    assert made.layout == theirs.layout
    others = theirs.state_dict()
    different = [name for name, ours in made.state_dict().items() if not ours.equal(others[name])]
    assert different == []
