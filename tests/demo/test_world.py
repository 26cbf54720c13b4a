"""The demo world: people, pictures, captions and the words that they are made of."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.demo.comfyui.server import comfyui_folder
from difflora_core.demo.networks.base import load_base, new_base, save_base
from difflora_core.demo.networks.text import CLIP_NUMBERS, END, PAD, START, UNKNOWN, tokenize
from difflora_core.demo.networks.vae import (
    VaeLoss,
    VaeObjective,
    decode_latents,
    encode_pool,
    new_vae,
    standardise_latents,
    vae_batches,
)
from difflora_core.demo.world import scenes
from difflora_core.demo.world.identities import PARAMETERS, SPLITS, identity_parameters, split_seeds
from difflora_core.demo.world.pool import cached_pool, portrait_pool
from difflora_core.demo.world.scenes import PICTURE_SIZE, render_pairs, render_portraits

WORDS = list(CLIP_NUMBERS)


def test_splits_share_no_identity() -> None:
    """Judges, examples, training, validation and test people are all different."""
    ranges = list(SPLITS.values())
    for k, first in enumerate(ranges):
        for second in ranges[k + 1 :]:
            assert not set(first) & set(second)
    with pytest.raises(ValueError, match="asked for"):
        split_seeds("test", 10_001)


@given(st.lists(st.integers(0, 400_000), min_size=1, max_size=6))
def test_identities_depend_on_their_seed_alone(seeds: list[int]) -> None:
    """A person is the same in any company, and every parameter lies in [-1, 1]."""
    together = identity_parameters(seeds)
    alone = torch.cat([identity_parameters([seed]) for seed in seeds])
    assert torch.equal(together, alone)
    assert together.shape == (len(seeds), len(PARAMETERS))
    assert together.abs().max() <= 1


def test_same_name_same_picture() -> None:
    """Pictures are named by identity and number; grain apart, company changes nothing."""
    first = render_portraits([5, 6], [1, 2])
    again = render_portraits([5, 6], [1, 2])
    assert torch.equal(first.images, again.images)
    assert first.captions == again.captions
    alone = render_portraits([6], [2])
    assert (alone.images[0] - first.images[1]).abs().max() < 0.1
    assert alone.captions[0] == first.captions[1]


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turning one parameter from low to high changes the face visibly."""
    column = PARAMETERS.index(name)

    def drawn(value: float) -> torch.Tensor:
        fixed = torch.zeros(1, len(PARAMETERS))
        fixed[0, PARAMETERS.index("beard")] = fixed[0, PARAMETERS.index("glasses")] = -1.0
        fixed[0, column] = value
        monkeypatch.setattr(scenes, "identity_parameters", lambda seeds: fixed)
        return render_portraits([1], [3], looks=("photo",)).images

    changed = (drawn(1.0) - drawn(-1.0)).abs().amax(-1)
    assert (changed > 0.1).sum() >= 4


def test_points_lie_on_the_face() -> None:
    """Five points inside the box, the box inside the picture, left before right."""
    for pictures in (
        render_portraits(list(range(40)), [0] * 40),
        render_pairs(list(range(20)), list(range(50, 70)), list(range(20))),
    ):
        height, width = pictures.images.shape[1:3]
        assert height == PICTURE_SIZE
        points, boxes = pictures.keypoints, pictures.boxes
        assert (points[..., 0] > boxes[..., None, 0]).all()
        assert (points[..., 0] < boxes[..., None, 2]).all()
        assert (points[..., 1] > boxes[..., None, 1]).all()
        assert (points[..., 1] < boxes[..., None, 3]).all()
        assert (points[..., 0, 0] < points[..., 1, 0]).all()
        assert boxes.min() > -2
        assert boxes[..., 2].max() < width + 2
        assert pictures.images.min() >= 0
        assert pictures.images.max() <= 1


def test_captions_use_known_words() -> None:
    """Every word of a caption is in the vocabulary, so nothing is trained as unknown."""
    pictures = render_portraits(list(range(300)), list(range(300)), describe=0.5)
    pairs = render_pairs(list(range(30)), list(range(30, 60)), list(range(30)))
    first, second = tokenize(pictures.captions + pairs.captions)
    assert not (first == UNKNOWN).any()
    assert (first[:, 0] == START).all()
    assert (first[:, -1] == END).all()
    assert (second[:, -1] == PAD).all()


def test_unknown_words_and_long_prompts() -> None:
    """A foreign word becomes the unknown word; a prompt is cut at 77 tokens with its end token."""
    first, second = tokenize(["photo of a zeppelin", "red " * 200])
    assert (first[0] == UNKNOWN).sum() == 1
    assert first.shape == second.shape == (2, 77)
    assert first[1, -1] == second[1, -1] == END


@pytest.mark.comfy
def test_words_have_clip_numbers() -> None:
    """Our table gives every word the number that CLIP's own vocabulary gives it."""
    vocabulary = json.loads(
        (comfyui_folder() / "comfy" / "sd1_tokenizer" / "vocab.json").read_text(encoding="utf-8")
    )
    for word in WORDS[4:]:
        assert vocabulary[f"{word}</w>"] == int(CLIP_NUMBERS[word])


def test_pool_is_kept(tmp_path: Path) -> None:
    """A pool read back from disk equals the one that was rendered."""
    path = tmp_path / "pool.safetensors"
    made = cached_pool(path, lambda: portrait_pool("validation", 2, 3))
    read = cached_pool(path, lambda: pytest.fail("rendered again"))
    assert torch.equal(made.images, read.images)
    assert (made.captions, made.scenes) == (read.captions, read.scenes)
    assert torch.equal(read.parameters()[0], read.parameters()[2])
    assert len(read.head(4)) == 4
    assert read.tail(3).captions == made.captions[-3:]


def test_a_decoder_that_trains_alone_leaves_the_latents() -> None:
    """Every second picture's latents get more noise; what the encoder says stays."""
    pool, loss = portrait_pool("train", 4, 2), VaeLoss(face=3.0, noise=0.2)
    batch = vae_batches(pool, 64, loss)(torch.Generator().manual_seed(0))
    spread = batch["spread"].flatten()
    assert 0.3 < (spread == 0).float().mean() < 0.7
    assert 0.15 < spread.max() <= 0.2
    assert vae_batches(pool, 8, VaeLoss())(torch.Generator())["spread"].eq(0).all()
    vae = new_vae(0)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    objective, few = VaeObjective(vae, loss), {name: part[:4] for name, part in batch.items()}
    latents = encode_pool(vae, pool.images)
    optimiser = torch.optim.SGD([p for p in vae.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        losses.append(objective(few)[0])
        losses[-1].backward()
        optimiser.step()
    assert losses[0] > losses[1] > losses[2]
    assert torch.equal(encode_pool(vae, pool.images), latents)


def test_standardised_latents_reconstruct_the_same() -> None:
    """Folding the scale into the VAE changes latents to mean 0, spread 1, and no picture."""
    vae = new_vae(0).eval()
    images = (render_portraits(list(range(8)), [0] * 8).images * 255).to(torch.uint8)
    with torch.no_grad():
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        deviation = vae.encode(pixels).latent_dist.std
        standardise_latents(vae, images)
        posterior = vae.encode(pixels).latent_dist
        after = vae.decode(posterior.mean).sample
    assert torch.allclose(before, after, atol=2e-4)
    assert posterior.mean.mean((0, 2, 3)).abs().max() < 0.05
    assert (posterior.mean.std((0, 2, 3)) - 1).abs().max() < 0.05
    ratio = posterior.std / deviation
    assert torch.allclose(ratio, ratio[:1, :, :1, :1].expand_as(ratio), rtol=1e-3)
    assert encode_pool(vae, images).shape == (8, 8, 16, 16)
    assert decode_latents(vae, encode_pool(vae, images).float()).shape == images.shape


def test_base_file_gives_the_same_model(tmp_path: Path) -> None:
    """What save_base writes load_base reads, to half precision."""
    unet, text = new_base(3)
    vae = new_vae(3)
    vae.register_to_config(scaling_factor=1.0)
    save_base(tmp_path / "base.safetensors", unet, text, vae)
    base = load_base(tmp_path / "base.safetensors")
    prompts = ["photo of a person, smiling", "cartoon of two people"]
    made, read = text.encode_prompts(prompts), base.encode_prompts(prompts)
    assert torch.allclose(made.context, read.context, atol=2e-2)
    noisy = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([10, 900])
    with torch.no_grad():
        for p in unet.parameters():
            p.copy_(p.half().float())
        expected = base.predict(noisy, steps, read)
        base.unet = unet
        assert torch.allclose(base.predict(noisy, steps, read), expected, atol=1e-4)
