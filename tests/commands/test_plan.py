"""`plan`: counts are those of the real networks, and what cannot fit is refused with a remedy."""

import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from difflora_core.adapters.attach import attach
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.commands import inspect, plan
from difflora_core.commands.counting import BACKWARD, _inputs, _lora, _saved, count_step
from difflora_core.commands.machine import MACHINES, Machine, machine
from difflora_core.commands.main import plain_console
from difflora_core.commands.plan import Counts, Settings, check_fits, functional_memory, stages_of
from difflora_core.demo.networks.base import UNET_CONFIG, demo_layout
from difflora_core.errors import ConfigError
from difflora_core.lora.layout import TARGETS, layout_from_unet_config, sdxl_layout
from difflora_core.models.difflora import DiffLoRAModel
from difflora_core.training.difflora.functional import FunctionalConfig, FunctionalObjective
from difflora_core.vision.features import ImageFeatures

LAYOUT = demo_layout(4)


@pytest.fixture(scope="module")
def demo():
    return Counts.of(Settings(10, 4, base="demo", resolution=64, rank=4))


@pytest.fixture(scope="module")
def sdxl():
    """SDXL at 256 px: the counts take seconds."""
    return Counts.of(Settings(10, 4, resolution=256))


def products(unet, inputs):
    """Operations of a forward pass by a rule of its own: every layer's weight at every place."""
    total = 0.0

    def count(layer, given, output):
        nonlocal total
        places = output.numel() / output.shape[1 if output.ndim == 4 else -1]
        total += 2 * layer.weight.numel() * places

    def attended(layer, given, options, output):
        nonlocal total
        own = given[0] if given else options["hidden_states"]
        other = options.get("encoder_hidden_states")
        other = own if other is None else other
        total += 4 * own.shape[1] * other.shape[1] * layer.to_q.weight.shape[0]

    hooks = [
        m.register_forward_hook(count)
        for m in unet.modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    hooks += [
        m.register_forward_hook(attended, with_kwargs=True)
        for m in unet.modules()
        if type(m).__name__ == "Attention"
    ]
    unet(*inputs[:3], added_cond_kwargs=inputs[3])
    for hook in hooks:
        hook.remove()
    return total


def test_shapes_alone_count_as_the_real_network_does():
    there = count_step(UNET_CONFIG, LAYOUT, 16, 16, "meta", torch.float32)
    unet = UNet2DConditionModel(**UNET_CONFIG).requires_grad_(False)
    inputs = _inputs(unet.config, 16, 16, torch.float32)
    adapters = lora_adapter_set(_lora(LAYOUT, "cpu"))
    with attach(unet, adapters, names=LAYOUT.module_names):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            unet(*inputs[:3], added_cond_kwargs=inputs[3])  # of the CPU's own it knows nothing
        with _saved(unet) as here:  # by the CPU's fused attention
            unet(*inputs[:3], added_cond_kwargs=inputs[3])
        unet.train()
        unet.enable_gradient_checkpointing()
        with _saved(unet) as ends:
            unet(*inputs[:3], added_cond_kwargs=inputs[3])
    assert there.parameters == sum(p.numel() for p in unet.parameters())
    assert there.forward == pytest.approx(counted.get_total_flops(), rel=1e-6)
    assert there.saved == pytest.approx(here.total, rel=0.02)
    assert there.largest == pytest.approx(max(here.units), rel=0.02)
    assert there.ends == pytest.approx(ends.total, rel=0.02)
    assert 0 < there.largest < there.saved
    assert there.activations(True) < there.activations(False)


def test_operations_against_a_rule_of_their_own():
    unet = UNet2DConditionModel(**UNET_CONFIG).requires_grad_(False)
    inputs = _inputs(unet.config, 16, 16, torch.float32)
    counted = count_step(UNET_CONFIG, LAYOUT, 16, 16, "meta", torch.float32).forward
    of_lora = 2 * sum(
        4 * (s.in_features + s.out_features) * (77 if "attn2.to_k" in s.name else 64)
        for s in LAYOUT
    )  # a few percent: places differ by level
    wanted = products(unet, inputs)
    assert wanted < counted < 1.1 * wanted + 2 * of_lora


def test_a_backward_pass_costs_what_is_said():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET_CONFIG).requires_grad_(False)
        inputs = _inputs(unet.config, 16, 16, torch.float32)
    adapters = lora_adapter_set(_lora(LAYOUT, "meta"))
    with attach(unet, adapters, names=LAYOUT.module_names):
        with FlopCounterMode(display=False) as forward:
            out = unet(*inputs[:3], added_cond_kwargs=inputs[3]).sample
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    share = backward.get_total_flops() / forward.get_total_flops()
    assert share == pytest.approx(BACKWARD, abs=0.15)


def test_the_vae_costs_what_is_said():
    """SDXL's encoder, at a size where its attention counts little."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            latent_channels=4,
        )
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            vae.encode(torch.zeros(1, 3, 256, 256))
    assert counted.get_total_flops() / 256**2 == pytest.approx(plan.ENCODER_OPERATIONS, rel=0.15)


@pytest.mark.parametrize("targets", ["attention", "transformer"])
def test_numbers_of_the_model_are_those_that_train(targets):
    settings = Settings(10, 4, base="demo", resolution=64, rank=4, targets=targets)
    demo = Counts.of(settings)
    layout = layout_from_unet_config("demo", UNET_CONFIG, 4, TARGETS[targets])
    model = DiffLoRAModel(plan.network_config(plan.DEMO, False), layout)

    class Base:
        unet = nn.Linear(1, 1)

    objective = FunctionalObjective(model, Base, FunctionalConfig())
    trained = [p for p in objective.parameters() if p.requires_grad]
    assert demo.model == sum(p.numel() for p in model.parameters())
    assert demo.trained == sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = [t for own in optimizer.state.values() for t in own.values() if t.ndim]
    held = sum(t.numel() * t.element_size() for t in [*trained, *(p.grad for p in trained), *state])
    quick = replace(settings, ema_on_cpu=True)
    rest = plan._base_memory(quick, demo) + 4 * (demo.model - demo.trained)
    lora = 12 * layout.numel
    assert functional_memory(quick, demo) == pytest.approx(held + rest + lora, rel=1e-3)
    s = plan.DEMO
    photo = ImageFeatures(
        torch.zeros(1, s.face),
        torch.ones(1, dtype=torch.bool),
        torch.zeros(1, s.image),
        torch.zeros(1, s.tokens, s.token_dim).half(),
    )
    tensors = (photo.face, photo.image, photo.image_tokens, torch.zeros(8, 16, 16).half())
    assert demo.picture == sum(t.numel() * t.element_size() for t in tensors)


def test_shared_out_each_gpu_keeps_its_part_and_room_for_the_whole(sdxl):
    """20 bytes a trained number; of 8 GPUs an eighth each, and 8 bytes while a step lasts."""
    several = Settings(1000, 10, gpus=8, batch=64)
    saved = functional_memory(several, sdxl) - functional_memory(replace(several, shard=True), sdxl)
    assert saved == pytest.approx((20 - 8 - 20 / 8) * sdxl.trained)
    alone = Settings(1000, 10)
    assert functional_memory(alone, sdxl) == functional_memory(replace(alone, shard=True), sdxl)


def test_sdxl_is_as_large_as_it_is(sdxl):
    assert sdxl.step.parameters == 2_567_463_684
    assert sdxl.model / 1e6 == pytest.approx(822, abs=1)
    assert sdxl.layout.numel == sdxl_layout(8).numel == 11_612_160
    corpus = stages_of(Settings(3100, 10, method="paper"), sdxl, MACHINES["h100"])[2]
    assert corpus.name == "corpus"
    assert corpus.disk / 1e9 == pytest.approx(144, rel=0.01)


def test_pictures_that_a_generator_draws_come_first(sdxl):
    """30 steps with guidance are 60 passes a picture; on twice the GPUs half the time."""
    here = Machine("a card", 24.0, 20.0)
    stages = stages_of(Settings(1000, 10, drawn=9, resolution=256), sdxl, here)
    assert [stage.name for stage in stages[:2]] == ["multiply", "prepare"]
    assert stages[0].seconds == pytest.approx(9000 * 60 * sdxl.step.forward / 20e12)
    twice = stages_of(Settings(1000, 10, drawn=9, resolution=256, gpus=2, batch=16), sdxl, here)
    assert twice[0].seconds == pytest.approx(stages[0].seconds / 2)
    with pytest.raises(ConfigError, match="drawn"):
        Settings(1000, 10, drawn=11)


def test_given_loras_are_read_and_not_trained(sdxl):
    here = Machine("a card", 24.0, 20.0, disk_mb_s=1000.0)

    def corpus(**more):
        stages = stages_of(Settings(1000, 10, method="paper", **more), sdxl, here)
        return next(stage for stage in stages if stage.name == "corpus")

    lora = 4 * sdxl.layout.numel
    assert corpus(loras="given").seconds == pytest.approx(1000 * 1.5 * lora / 1e9)
    assert corpus(loras="given").disk == corpus().disk == 1000 * lora
    trained = 1000 * plan.DREAMBOOTH_STEPS * sdxl.step.operations(True) / 20e12
    assert corpus().seconds == pytest.approx(trained)


def test_a_corpus_beyond_the_computers_memory_is_read_in_every_step(sdxl):
    here = Machine("a card", 24.0, 1e9, disk_mb_s=1000.0)

    def seconds(host_gb):
        stages = stages_of(Settings(1000, 10, method="paper", host_gb=host_gb), sdxl, here)
        return next(stage.seconds for stage in stages if stage.name == "LAE")

    lora = 4 * sdxl.layout.numel / 1e9
    assert seconds(128.0) == pytest.approx(1000 * lora, rel=0.01)
    assert seconds(64.0) == pytest.approx(plan.LAE.loop.steps * plan.LAE.batch * lora, rel=0.01)


def test_what_does_not_fit_is_refused_with_what_does(sdxl):
    card = Machine("a small card", 22.0, 20.0)
    check_fits(Settings(10, 4, batch=8, accumulate=8), sdxl, card)
    heavy = replace(sdxl, step=replace(sdxl.step, saved=10**10))
    wide = Settings(10, 4, batch=8, accumulate=8, checkpointing=False)
    with pytest.raises(ConfigError, match=r"functional needs .* With --checkpointing it fits\."):
        check_fits(wide, heavy, card)
    crowd = replace(sdxl, step=replace(sdxl.step, ends=10**9))
    with pytest.raises(ConfigError, match=r"With --checkpointing --accumulate 8 it fits\."):
        check_fits(Settings(10, 4, batch=8, accumulate=1), crowd, card)
    with pytest.raises(ConfigError, match="No setting makes it fit"):
        check_fits(Settings(10, 4), sdxl, MACHINES["rtx3060"])


@given(
    people=st.integers(1, 10**7),
    pictures=st.integers(1, 50),
    method=st.sampled_from(["functional", "paper", "both"]),
    name=st.sampled_from(sorted(MACHINES)),
)
def test_more_takes_longer_and_more_gpus_less(demo, people, pictures, method, name):
    here = MACHINES[name]
    one = Settings(people, pictures, method=method, base="demo", resolution=64, rank=4)
    for more in (replace(one, people=people + 1), replace(one, pictures=pictures + 1)):
        pairs = zip(stages_of(one, demo, here), stages_of(more, demo, here), strict=True)
        assert all(a.seconds <= b.seconds and a.disk <= b.disk for a, b in pairs)
    several = replace(one, gpus=2, accumulate=4)
    pairs = zip(stages_of(one, demo, here), stages_of(several, demo, here), strict=True)
    assert all(a.seconds >= b.seconds for a, b in pairs)


def test_a_cluster_says_what_breaks_first(sdxl):
    cluster = Settings(4_000_000, 1, gpu="h100", gpus=1000, batch=8000, accumulate=8, workers=8000)
    name, share = plan.strains(cluster, sdxl, MACHINES["h100"])[0]
    assert name == "pictures' latents and features in the computer's memory"
    assert share > 10
    with pytest.raises(ConfigError, match="cannot be shared evenly by 1000 x 8 parts"):
        replace(cluster, batch=4000)


def test_the_machine_at_hand_is_measured_and_planned_with(tmp_path, capsys):
    file = tmp_path / "machine.json"
    inspect.run(inspect.Settings(str(file), measure=True), plain_console())
    found = machine(str(file))
    assert found == Machine(**json.loads(file.read_text()))
    assert math.isfinite(found.tflops)
    assert 0 < found.tflops < 1000
    plan.run(Settings(10, 4, gpu=str(file), base="demo", resolution=64, rank=4), plain_console())
    told = capsys.readouterr().out
    for piece in ("prepare", "functional", "evaluate", "TFLOP a sample", "of what there is"):
        assert piece in told
    with pytest.raises(ConfigError, match="no known GPU"):
        machine("rtx9999")
    file.write_text('{"name": "x", "memory_gb": -1, "tflops": 1}')
    with pytest.raises(ConfigError, match="memory_gb"):
        machine(str(file))
