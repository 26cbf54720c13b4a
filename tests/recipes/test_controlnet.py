"""The ControlNet recipe: silent before training, exact files, loss that falls."""

import pytest
import torch
from torch.nn.utils import parametrize

from difflora_core.demo.networks.base import UNET_CONFIG, load_base, new_base, save_base
from difflora_core.demo.networks.vae import new_vae
from difflora_core.errors import CheckpointError
from difflora_core.training.controlnet import (
    MARKER,
    ControlledBase,
    ControlLoRA,
    ControlNetConfig,
    KeypointPictures,
    control_batches,
    control_pictures,
    fit,
)
from difflora_core.training.loop import LoopConfig
from difflora_core.vision.keypoint_picture import keypoint_picture


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    unet, text = new_base(3)
    save_base(path, unet, text, new_vae(4))
    return load_base(path)


@pytest.fixture
def control(base):
    return ControlLoRA(base, 4, torch.Generator().manual_seed(1))


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(6, 8, 16, 16, generator=generator)
    points = torch.rand(6, 1, 5, 2, generator=generator) * 64
    return KeypointPictures(latents, points, ["photo of a person", "cartoon of a person"] * 3, 4)


def answers(base, control, pictures):
    """The base's output with and without the ControlNet."""
    text = base.encode_prompts(list(pictures.captions))
    timesteps = torch.tensor([999, 700, 500, 300, 100, 1])
    hints = control_pictures(pictures, torch.arange(6))
    plain = base.predict(pictures.latents, timesteps, text)
    return plain, ControlledBase(base, control, hints).predict(pictures.latents, timesteps, text)


def shake(control):
    """Random numbers in place of everything that was to be learned."""
    generator = torch.Generator().manual_seed(5)
    for parameter in control.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def test_changes_nothing_before_training_and_something_after(base, control, pictures):
    plain, steered = answers(base, control, pictures)
    assert torch.equal(plain, steered)
    shake(control)
    plain, steered = answers(base, control, pictures)
    assert (plain - steered).abs().mean() > 0.01


@torch.no_grad()
def test_file_holds_all_that_was_learned_under_names_of_the_unet(base, control, pictures):
    shake(control)
    state = control.state()
    assert MARKER in state
    assert state["input_hint_block.0.weight"].shape == (16, 3, 3, 3)
    assert state["input_hint_block.14.weight"].shape == (
        UNET_CONFIG["block_out_channels"][0],
        256,
        3,
        3,
    )
    assert state["input_blocks.1.0.in_layers.2.up"].shape == (64, 4)
    assert state["input_blocks.1.0.in_layers.2.down"].shape == (4, 64 * 9)
    again = ControlLoRA(base, 4, torch.Generator().manual_seed(9))
    again.load_state(state)
    expected, found = (answers(base, c, pictures)[1] for c in (control, again))
    assert torch.equal(expected, found)
    with pytest.raises(CheckpointError, match="another base model or rank"):
        ControlLoRA(base, 3, torch.Generator()).load_state(state)


@torch.no_grad()
def test_low_rank_change_is_up_times_down(control):
    shake(control)
    layer = control.net.down_blocks[0].resnets[0].conv1
    assert parametrize.is_parametrized(layer, "weight")
    change, before = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    by_hand = before + torch.einsum("or,ri->oi", change.up, change.down).view(before.shape)
    torch.testing.assert_close(layer.weight, by_hand)


def test_control_pictures_are_as_comfyui_resizes_them(pictures):
    coarse = control_pictures(pictures, torch.tensor([2]), coarse=True)[0]
    small = keypoint_picture(pictures.keypoints[2], 64, 64).permute(2, 0, 1)
    assert torch.equal(coarse, small.repeat_interleave(2, 1).repeat_interleave(2, 2))
    fine = control_pictures(pictures, torch.tensor([2]), coarse=False)[0]
    assert torch.equal(fine, keypoint_picture(pictures.keypoints[2] * 2, 128, 128).permute(2, 0, 1))


def test_batches_depend_on_the_seed_alone_and_larger_pictures_come_fewer(base, pictures):
    wide = KeypointPictures(
        torch.randn(4, 8, 16, 32), torch.rand(4, 2, 5, 2) * 64, ["photo of two people"] * 4, 4
    )
    draw = control_batches(base, [(0.5, pictures), (0.5, wide)], 4)
    sizes = set()
    for seed in range(8):
        one, other = (draw(torch.Generator().manual_seed(seed)) for _ in range(2))
        assert all(torch.equal(one[key], other[key]) for key in one)
        count, _, height, width = one["latents"].shape
        assert one["hints"].shape == (count, 3, 8 * height, 8 * width)
        sizes.add((count, width))
    assert sizes == {(4, 16), (2, 32)}


def test_training_moves_the_controlnet_alone(base, control, pictures, tmp_path):
    before = {name: p.clone() for name, p in base.unet.named_parameters()}
    loop = LoopConfig(steps=8, learning_rate=3e-3, warmup=1, log_every=8, weight_decay=0.0)
    fit(control, base, [(1.0, pictures)], loop, tmp_path, ControlNetConfig(batch=4, rank=4))
    assert all(torch.equal(before[n], p) for n, p in base.unet.named_parameters())
    assert control.state()["zero_convs.0.0.weight"].abs().max() > 0
    assert control.state()["input_blocks.1.0.in_layers.2.up"].abs().max() > 0


def test_high_noise_comes_by_the_cubic_law(base, pictures):
    """t / T = 1 - u^3 of a uniform u: a share of 1 - (1 - x)^(1/3) lies below x."""
    drawn = control_batches(base, [(1.0, pictures)], 200)(torch.Generator().manual_seed(0))
    times = drawn["timesteps"].double() / len(base.alphas_cumprod)
    for x in (0.1, 0.3, 0.5, 0.7, 0.9):
        share = float((times < x).double().mean())
        assert share == pytest.approx(1 - (1 - x) ** (1 / 3), abs=0.011)  # strata of 1 / 200
