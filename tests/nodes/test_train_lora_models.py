"""Train Identity LoRA on models of other kinds, precisions and sizes, in ComfyUI's own process."""

import re

import pytest
import torch

from difflora_core.demo.comfyui.workflow_api import PACK


def test_models_that_cannot_be_trained_on(parts, unet):
    import comfy.model_base
    import comfy.model_sampling

    check, model = parts("nodes.host.base").check_trainable, unet()
    check(model)
    model.model.diffusion_model.in_channels = 17
    with pytest.raises(Exception, match=r"reads 17 channels where a picture has 8: it is made for"):
        check(model)
    model.model.diffusion_model.in_channels = 8
    edm = model.clone()
    edm.add_object_patch("model_sampling", comfy.model_sampling.ModelSamplingContinuousEDM())
    with pytest.raises(Exception, match="Training needs SDXL with its own noise schedule"):
        check(edm)
    model.model.__class__ = comfy.model_base.SDXLRefiner
    with pytest.raises(Exception, match="refiner of SDXL, which only polishes"):
        check(model)


@pytest.mark.parametrize("kind", ["float32", "fp8", "v_prediction"])
def test_gradients_reach_the_factors(parts, unet, monkeypatch, kind):
    """On quantised weights and on v-prediction models too; the weights stay as they are."""
    import comfy.model_management as management
    import comfy.model_sampling

    if kind == "fp8":
        monkeypatch.setattr(management, "unet_dtype", lambda *_, **__: torch.float8_e4m3fn)
    with torch.inference_mode():
        model = unet()
    if kind == "v_prediction":
        sampling = type(
            "V", (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION), {}
        )
        model.add_object_patch("model_sampling", sampling(model.model.model_config))
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    base = parts("nodes.host.base").ComfyBase(model, None)
    addresses = [p.data_ptr() for p in base.unet.parameters()]
    base.load(1e6)
    if kind == "float32":  # no second copy of the model
        assert [p.data_ptr() for p in base.unet.parameters()] == addresses
    if kind == "v_prediction":
        assert base.prediction_type == kind
    recipe = parts("difflora_core.training.lora.objective")
    losses = parts("difflora_core.training.losses")
    attach = parts("difflora_core.adapters.attach").attach
    adapters = parts("difflora_core.adapters.lora").lora_adapter_set
    text = parts("difflora_core.base_model.protocol").TextCondition
    tasks = parts("difflora_core.training.picture_task")
    task = tasks.PictureTask(base, None, "sdxl")
    objective = recipe.LoRAObjective(task, recipe.LoRATraining(rank=2, targets="all"))
    g = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(2, 8, 16, 16, generator=g) for _ in range(2))
    width = model.model.model_config.unet_config["context_dim"]
    pooled = torch.zeros(2, 1600 - 6 * 256)
    condition = text(torch.randn(2, 7, width, generator=g), pooled)
    batch = losses.NoisedBatch(latents, noise, torch.tensor([100, 800]), condition)
    with attach(base.unet, adapters(objective.weights), names=objective.module_names):
        loss = losses.denoising_error(base, batch, "min_snr").mean()
        loss.backward()
    ups = list(objective.factors)[1::2]
    assert all(bool(torch.isfinite(p.grad).all()) for p in ups)
    assert sum(float(p.grad.abs().max()) > 0 for p in ups) == len(ups)
    after = model.model.state_dict()
    assert all(torch.equal(v.float(), after[k].float()) for k, v in before.items())


@pytest.mark.parametrize("count", [3, 75, 76, 160])
def test_captions_of_any_length_are_encoded_as_comfyui_does(parts, demo_world, count):
    clip = parts("nodes.host.demo").load_demo_clip(demo_world / "base.safetensors")
    words = "photo of a person smiling blue background red shirt".split()
    prompt = " ".join(words[k % len(words)] for k in range(count))
    short = "photo of a person"
    with torch.no_grad():
        own = parts("nodes.host.text").ComfyText(clip).encode([prompt, short], {})
        for row, text in enumerate((prompt, short)):
            context, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
            repeated = context.repeat(1, own.context.shape[1] // context.shape[1], 1)
            torch.testing.assert_close(own.context[row], repeated[0].to(own.context))
            torch.testing.assert_close(own.pooled[row], pooled[0].to(own.pooled))
    assert own.context.shape[1] == 77 * -(-count // 75)
    assert int(own.real[0].sum()) == count


def test_sizes_of_pictures_reach_the_unet_as_in_diffusers(parts, unet, demo_world):
    base = parts("nodes.host.base").ComfyBase(unet(), None)
    base.load(0)
    reference = parts("difflora_core.demo.networks.base").load_base(demo_world / "base.safetensors")
    condition = parts("difflora_core.base_model.protocol").TextCondition
    g = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 8, 16, 16, generator=g)
    width = reference.unet.config.cross_attention_dim
    words = (torch.randn(2, 7, width, generator=g), torch.randn(2, 1600 - 6 * 256, generator=g))
    sizes = torch.tensor([[512, 300, 10, 0, 128, 128], [90, 2000, 0, 700, 128, 128]]).float()
    steps, found = torch.tensor([100, 800]), []
    for own in (None, sizes):
        with torch.no_grad():
            wanted = reference.predict(noisy, steps, condition(*words, own))
            found.append(base.predict(noisy, steps, condition(*words, own)).float())
        torch.testing.assert_close(found[-1], wanted, atol=1e-4, rtol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_want_of_memory_says_what_fits_and_keeps_the_state(parts, unet):
    import comfy.model_management as management

    memory, config = parts("nodes.host.memory"), parts("difflora_core.training.lora.objective")
    model = unet()
    run = config.LoRATraining(batch=4)
    fast = memory.plan_memory(model, 128 * 128, run, "fast")
    saving = memory.plan_memory(model, 128 * 128, run, "saving")
    assert saving.needed < fast.needed / 5
    parted = memory.plan_memory(
        model, 128 * 128, config.LoRATraining(batch=4, accumulate=4), "fast"
    )
    assert parted.needed == fast.needed / 4
    huge = memory.plan_memory(model, 10**7, run, "auto")
    assert huge.checkpointing
    assert not memory.plan_memory(model, 256, run, "auto").checkpointing
    for plan, settings, words in (
        (fast, run, "Set memory to saving. .*queue again and it goes on"),
        (saving, run, "Set accumulate to 4. .*queue again"),
        (saving, config.LoRATraining(batch=4, accumulate=4), "a lower resolution.*starts anew"),
    ):
        with pytest.raises(Exception, match=words), memory.fits(plan, settings):
            raise management.OOM_EXCEPTION("CUDA out of memory")


def test_copies_of_weights_of_another_type_are_counted(parts, unet, monkeypatch):
    """fp8 on a card, bfloat16 on a CPU: autograd keeps what a layer has cast."""
    import comfy.model_management as management

    memory, config = parts("nodes.host.memory"), parts("difflora_core.training.lora.objective")
    model, run = unet(), config.LoRATraining(batch=1)
    plain = {choice: memory.plan_memory(model, 256, run, choice) for choice in ("fast", "saving")}
    assert memory.cast_bytes(model) == 0
    monkeypatch.setattr(model.model, "get_dtype_inference", lambda: torch.float32)
    monkeypatch.setattr(model.model, "get_dtype", lambda: torch.float8_e4m3fn)
    copies = 4 * model.model_size()  # a byte each as it says, four as it computes
    fast = memory.plan_memory(model, 256, run, "fast")
    assert fast.needed == plain["fast"].needed + copies
    assert memory.plan_memory(model, 256, run, "saving").needed == plain["saving"].needed
    for room, wanted in ((0.9, True), (1.2, False)):
        there = room * (fast.needed + fast.weights) / memory.SHARE
        monkeypatch.setattr(management, "get_total_memory", lambda *_, there=there: there)
        assert memory.plan_memory(model, 256, run, "auto").checkpointing == wanted


def test_bfloat16_where_the_device_has_it(parts, unet, monkeypatch):
    import comfy.model_management as management

    base, model = parts("nodes.host.base"), unet()
    monkeypatch.setattr(model.model, "get_dtype_inference", lambda: torch.float16)
    assert base.ComfyBase(model, None).dtype == torch.float16  # then the loss is scaled
    monkeypatch.setattr(management, "should_use_bf16", lambda *_, **__: True)
    assert base.ComfyBase(model, None).dtype == torch.bfloat16


SDXL_PARAMETERS = 2.567463684e9
RANK_16_ON_ATTENTION = 2 * 11_612_160
TFLOPS = {"RTX 4060": 30, "RTX 3060": 25.6, "RTX 4080": 97.5, "RTX 4090": 165.2, "A100": 312}
"""Half precision into float32, dense, as their maker gives them."""


@pytest.mark.parametrize("page", ["DiffLoRA_TrainLoRA.md", "DiffLoRA_TrainLoRA/zh.md"])
def test_the_memory_table_of_the_help_page_is_what_the_planner_counts(parts, page):
    memory = parts("nodes.host.memory")
    lines = (PACK / "web" / "docs" / page).read_text("utf-8").splitlines()
    rows = [[c.strip(" `") for c in line.split("|")[1:-1]] for line in lines if " GB" in line]
    rows = [row for row in rows if len(row) == 5 and row[1].isdigit()]
    assert len(rows) == 6
    for card, batch, choice, seconds, peak in rows:
        name = next(known for known in TFLOPS if card.startswith(known))
        each = memory.CHECKPOINTED if choice == "saving" else memory.PLAIN
        weights = SDXL_PARAMETERS * (1 if "fp8" in card else 2)
        needed = weights + int(batch) * each * 128**2 + memory.TRAINED * RANK_16_ON_ATTENTION
        work = int(batch) * (18 if choice == "saving" else 12)
        assert float(re.match(r"[\d.]+", peak)[0]) == pytest.approx(needed / 1e9, abs=0.06)
        assert float(re.match(r"[\d.]+", seconds)[0]) == pytest.approx(
            work / TFLOPS[name] * 4, abs=0.06
        )
        assert all("counted" in cell or "计算" in cell for cell in (seconds, peak))
        room = float(re.search(r"(\d+) ?GB", card)[1])
        assert needed / 2**30 < memory.SHARE * room
