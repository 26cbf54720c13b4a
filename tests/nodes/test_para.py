"""PaRa on ComfyUI's models: as weights, outputs and core's LoRA; on fp8, offloaded, compiled."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from difflora_core.comfy_client import ComfyPromptError

KEY = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
LAYER = KEY.removeprefix("diffusion_model.").removesuffix(".weight")


@pytest.fixture
def random_para(random_adaptation):
    """Makes random directions."""
    return random_adaptation("para")


@pytest.fixture
def on(parts):
    """A clone of a model with an adaptation on it."""
    host, methods = parts("nodes.host.adapters"), parts("difflora_core.methods.base")

    def put(model, prepared, strength=1.0, **link):
        settings = prepared.adaptation.settings
        applied = methods.AppliedAdaptation(prepared, settings, strength)
        return host.with_link(model, host.Link(applied, **link))

    return put


def lora_patches(model, seed=5):
    """A small random change of every self-attention query, as core's patches."""
    generator = torch.Generator().manual_seed(seed)
    state = model.model.state_dict()
    keys = [k for k in state if k.endswith("attn1.to_q.weight")]
    return {k: ("diff", (0.05 * torch.randn(state[k].shape, generator=generator),)) for k in keys}


@torch.no_grad()
def call(model, load=True):
    """One call of a model, its patches in its weights, as ComfyUI's sampler makes it."""
    import comfy.model_management as management

    if load:
        management.load_models_gpu([model], force_patch_weights=True)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 8, 16, 16, generator=generator)
    width = model.model.model_config.unet_config["context_dim"]
    context = torch.randn(2, 7, width, generator=generator)
    marks = {"difflora_negative": torch.tensor([1.0, 0.0])} if model.wrappers else {}
    return model.model.apply_model(
        x, torch.full((2,), 5.0), c_crossattn=context, y=torch.zeros(2, 1600),
        transformer_options={"wrappers": model.wrappers}, **marks,
    )  # fmt: skip


def by_hand(model, steps):
    """A plain model whose weights are changed in float64: (prepared, strength), or (patches,)."""
    for step in steps:
        if len(step) == 1:
            for key, (_, (change,)) in step[0].items():
                model.model.get_parameter(key).data += change
            continue
        prepared, strength = step
        for layer, tensors in prepared.adaptation.layers.items():
            weight = model.model.diffusion_model.get_submodule(layer).weight
            q, flat = tensors["directions"].double(), weight.data.flatten(1).double()
            new = flat - strength * q @ (q.mT @ flat)
            weight.data = new.reshape(weight.shape).to(weight.dtype)
    return model


def close(got, wanted, bare):
    """The same to rounding, and far from the model without it."""
    assert float((wanted - bare).abs().max()) > 0.05
    assert float((got - wanted).norm() / (wanted - bare).norm()) < 2e-3


def test_it_is_the_written_out_weight_and_leaves_the_model_alone(unet, random_para, on):
    model, one, two = unet(), random_para(1), random_para(2)
    bare = call(model)
    for strength in (1.0, 0.4, -0.5):
        changed = on(model, one, strength)
        close(call(changed), call(by_hand(unet(), [(one, strength)])), bare)
        assert torch.equal(call(model), bare)
    both = call(on(on(model, one), two, 0.7))
    close(both, call(by_hand(unet(), [(one, 1.0), (two, 0.7)])), bare)
    other = call(by_hand(unet(), [(two, 0.7), (one, 1.0)]))
    assert float((other - both).norm() / (both - bare).norm()) > 0.01  # the order matters
    nothing = on(model, one, 0.0)
    assert not nothing.patches
    assert torch.equal(call(nothing), bare)


def test_joined_it_takes_out_all_of_both(node_module, unet, random_para, on):
    model, one, two = unet(), random_para(1), random_para(2)
    bare = call(model)
    (joined,) = node_module("para").JoinPaRa.execute(one, two).result
    wanted = unet()
    for layer, tensors in one.adaptation.layers.items():
        weight = wanted.model.diffusion_model.get_submodule(layer).weight
        other = two.adaptation.layers[layer]["directions"]
        b, flat = torch.cat([tensors["directions"], other], 1).double(), weight.data.flatten(1)
        left = flat.double() - b @ torch.linalg.lstsq(b, flat.double()).solution
        weight.data = left.reshape(weight.shape).to(weight.dtype)
    close(call(on(model, joined)), call(wanted), bare)


@pytest.mark.parametrize("first", ["para", "lora"])
def test_a_lora_stays_whole_wherever_it_is_loaded(unet, random_para, on, first):
    model, one, patches = unet(), random_para(1), lora_patches(unet())
    bare = call(model)
    wanted = call(by_hand(unet(), [(one, 1.0), (patches,)]))
    changed = on(model, one) if first == "para" else model.clone()
    assert changed.add_patches(patches)
    changed = changed if first == "para" else on(changed, one)
    close(call(changed), wanted, bare)
    cancelled = call(by_hand(unet(), [(patches,), (one, 1.0)]))
    assert float((cancelled - wanted).norm() / (wanted - bare).norm()) > 0.02


def test_a_lora_that_is_not_left_whole_is_said(unet, random_para, on, caplog):
    patched = unet().clone()
    patched.add_patches(lora_patches(patched))
    for model, words in (
        (on(unet(), random_para(1), end=0.5), 0),
        (on(patched, random_para(1), end=0.5), 1),
    ):
        (chain,) = model.get_wrappers("apply_model", "difflora")
        chain.prepared = True
        caplog.clear()
        chain.begin(model)
        assert len([r for r in caplog.records if "out of loaded LoRAs, too" in r.message]) == words


def test_it_follows_a_merge(parts, unet, random_para, on):
    """What scales a weight comes first, and the weight that PaRa sees is the merged one."""
    model, one = unet(), random_para(1)
    state = {k: v for k, v in model.model.state_dict().items() if k.endswith(".weight")}
    other = {k: ("diff", (0.5 * v.flip(0),)) for k, v in state.items() if "attn1" in k}
    merged = model.clone()
    merged.add_patches(other, 1.0, 0.5)
    merged.add_patches(lora_patches(model))
    weights = parts("nodes.host.weights")
    live = weights.live_weight(on(merged, random_para(2)), LAYER)
    q = random_para(2).adaptation.layers[LAYER]["directions"]
    plain = 0.5 * state[KEY] + 0.5 * state[KEY].flip(0)
    torch.testing.assert_close(live.cpu(), plain - q @ q.mT @ plain, rtol=1e-4, atol=1e-5)
    kinds = [type(p[1]).__name__ for p in on(merged, one).patches[KEY]]
    assert kinds == ["tuple", "WeightEditPatch", "tuple"]


def test_on_a_part_of_the_steps_it_acts_on_outputs(unet, random_para, on):
    model, one = unet(), random_para(1)
    bare, weights = call(model), call(on(model, one, 0.8))
    hooked = on(model, one, 0.8, end=0.9)
    assert not hooked.patches
    close(call(hooked), weights, bare)
    positive = call(on(model, one, 0.8, positive_only=True))
    torch.testing.assert_close(positive[0], bare[0], rtol=1e-4, atol=1e-4)
    close(positive[1], weights[1], bare[1])


def test_cores_lora_loader_draws_the_same(parts, unet, random_para, on, tmp_path):
    """The export for this checkpoint, through a file and ComfyUI's own reader; a LoRA beside it."""
    import comfy.sd
    import comfy.utils

    para, base = parts("difflora_core.methods.para"), parts("nodes.host.base")
    to_state_dict = parts("difflora_core.lora.formats.state_dict").to_state_dict
    model, one = unet(), random_para(1)
    bare, wanted = call(model), call(on(model, one, 0.7))
    patched = model.clone()
    patched.add_patches(lora_patches(model))
    for source in (model, patched):  # what a LoRA adds is no part of the checkpoint
        layers = base.ModelLayers(source, one.adaptation)
        lora = para.PaRa.as_lora(one, layers)
        state = to_state_dict(lora, "kohya_ldm")
        assert len(state) == 3 * len(one.adaptation.layers)
        save_file(state, tmp_path / "para.safetensors")
        read = comfy.utils.load_torch_file(str(tmp_path / "para.safetensors"))
        loaded, _ = comfy.sd.load_lora_for_models(model, None, read, 0.7, 0)
        assert len(loaded.patches) == len(one.adaptation.layers)
        close(call(loaded), wanted, bare)
    with pytest.raises(Exception, match="on the connected model already"):
        para.PaRa.as_lora(one, base.ModelLayers(on(model, one), one.adaptation))


def test_fp8_weights(unet, random_para, on, monkeypatch):
    """The same as core's patch of the written-out change, which rounds to fp8 with the same seed.

    As outputs nothing is rounded again, so there the plain model with rounded numbers is the
    reference.
    """
    import comfy.model_management as management

    plain, one = unet(), random_para(1)
    for parameter in plain.model.diffusion_model.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn).to(parameter.dtype)
    bare, wanted = call(plain), call(on(plain, one))
    monkeypatch.setattr(management, "unet_dtype", lambda *_, **__: torch.float8_e4m3fn)
    small, changes = unet(), {}
    assert small.model.get_parameter(KEY).dtype == torch.float8_e4m3fn
    for layer, tensors in one.adaptation.layers.items():
        q, key = tensors["directions"].double(), f"diffusion_model.{layer}.weight"
        weight = small.model.get_parameter(key)
        change = -q @ (q.mT @ weight.double().flatten(1))
        changes[key] = ("diff", (change.reshape(weight.shape).float(),))
    cores = small.clone()
    assert len(cores.add_patches(changes)) == len(changes)
    reference = call(cores)
    assert float((call(on(small, one)) - reference).norm() / (wanted - bare).norm()) < 0.02
    hooked = call(on(small, one, end=0.9))
    assert float((hooked - wanted).norm() / (wanted - bare).norm()) < 0.02


def test_weights_off_the_device(unet, random_para, on):
    """Partly loaded, as with little video memory: the same as fully loaded."""
    outputs = []
    for memory in (0, 1):
        for link in ({}, {"end": 0.9}):
            model = on(unet(), random_para(1), **link)
            model.load(torch.device("cpu"), lowvram_model_memory=memory, full_load=memory == 0)
            cast = [m for m in model.model.modules() if getattr(m, "weight_function", None)]
            assert bool(cast) == (bool(memory) and not link)
            outputs.append(call(model, load=False))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=2e-3, rtol=2e-3)
    assert float((outputs[0] - call(unet())).abs().max()) > 0.05


@pytest.mark.slow  # as in test_styleinject.py, whose compiled chains are in every run
@pytest.mark.parametrize("link", [{}, {"end": 0.9}])
def test_compiled(unet, random_para, on, link):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model, one = unet(), random_para(1)
    bare, wanted = call(model), call(on(model, one))
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    call(compiled)
    close(call(on(compiled, one, **link)), wanted, bare)


def test_it_is_moved_by_dynamic_memory(parts):
    """DynamicVRAM makes a patch anew from what it was made of, its tensors elsewhere."""
    import comfy.lora

    weights, methods = parts("nodes.host.weights"), parts("difflora_core.methods.base")
    reduced = parts("difflora_core.adapters.para").reduced
    q = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(1)))[0]
    patch, counter = weights.WeightEditPatch.of(methods.WeightEdit(reduced, (q,))), [0]
    again = comfy.lora.prefetch_prepared_value(patch, counter, None, None, False)
    assert counter[0] >= q.numel() * 4  # its memory is counted
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    made = comfy.lora.calculate_weight([(1.0, again, 1.0, None, None)], weight.clone(), KEY)
    torch.testing.assert_close(made, weight - q @ q.mT @ weight)


def test_what_does_not_fit_is_refused(parts, unet, random_para, on):
    from dataclasses import replace

    model, one = unet(), random_para(1)
    strange = {f"input_blocks.99.{n}": t for n, t in one.adaptation.layers.items()}
    prepared = type(one)(replace(one.adaptation, base="sd9", layers=strange))
    with pytest.raises(Exception, match=r"made for sd9.*do not fit the model"):
        on(model, prepared)
    config = parts("difflora_core.methods.para").PaRaConfig
    narrow = type(one)(replace(one.adaptation, settings=config()))
    with pytest.raises(Exception, match=r"beyond 2\.5% pictures collapse"):
        on(model, narrow)
    sizes = sorted(len(t["directions"]) for t in one.adaptation.layers.values())
    tight = type(one)(replace(one.adaptation, settings=config(3 / sizes[0])))
    once = on(model, tight)
    for link in ({}, {"end": 0.5}):  # both count, wherever they act
        with pytest.raises(Exception, match="4 of"):
            on(once, tight, **link)


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def test_its_node_trains_and_keeps_a_file(comfy, comfy_server):
    from difflora_core.methods.para import PaRa
    from difflora_core.storage.adapter_file import read_adaptation

    nodes = {
        "demo": node("DiffLoRA_LoadDemo"),
        "images": node("EmptyImage", width=64, height=64, batch_size=2, color=0xFF8800),
        "train": node(
            "DiffLoRA_TrainPaRa", model=["demo", 0], clip=["demo", 1], vae=["demo", 2],
            images=["images", 0], prompts="photo of a person\nphoto of a person, smiling", steps=3,
            rank=1, batch_size=2, seed=1, file_name="orange", mirror=True, small_file=False,
            learning_rate=0.01, layers="no_cross_attention", start="least_used", bound=0.2,
        ),
        "told": node("PreviewAny", source=["train", 1]),
    }  # fmt: skip
    comfy.run(nodes)
    made = read_adaptation(
        comfy_server.base_directory / "models/difflora_styles/orange.safetensors"
    )
    PaRa.check(made)
    assert (made.method, made.word, made.facts["rank"], made.facts["pictures"]) == (
        "para", None, 1, 4,
    )  # fmt: skip
    assert made.settings.bound == 0.2
    tight = node("DiffLoRA_TrainPaRa", **nodes["train"]["inputs"] | {"bound": 0.001})
    with pytest.raises(ComfyPromptError, match="pictures collapse"):
        comfy.run(nodes | {"train": tight})


def test_distillation_refuses_a_rank_before_the_teacher_draws(parts, unet, demo):
    import comfy.utils

    (model, clip, vae), teacher = demo, unet()
    teacher.add_patches(lora_patches(teacher))
    node = parts("nodes.distillation").DistilCheckpoint
    given = {"teacher": teacher, "teacher_clip": clip, "model": model, "clip": clip, "vae": vae}
    given |= {"method": "para", "rank": 2, "prompts": "photo of a person", "width": 64}
    defaults = {i.id: getattr(i, "default", None) for i in node.GET_SCHEMA().inputs}
    drawn = []
    comfy.utils.set_progress_bar_global_hook(lambda *step, **_: drawn.append(step))
    try:
        with pytest.raises(Exception, match=r"would take 2 of 64 .*\(1 in all here\)"):
            node.execute(**{**defaults, "height": 64, "prompt_file": "none", **given})
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert drawn == []


def test_pictures_of_a_folder_come_after_those_that_are_masked(node_module, tmp_path):
    request = node_module("host.training_request")

    class Base:
        def encode_images(self, images):
            return images.permute(0, 3, 1, 2)

    Image.new("RGB", (6, 4), (100, 0, 0)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a boat", "utf-8")
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 2, 2, 3)
    masks = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    part = request.PictureParts(None, None, None, images, None, masks)
    asked = request.PictureRequest("one\ntwo", "a", False, False, more=(tmp_path / "0.png",))
    made = asked.examples(Base(), part)
    assert made.latents[:, 0, 0, 0].tolist() == pytest.approx([0, 1, 100 / 255])
    assert [list(p) for p in made.prompts] == [["one", "two"], ["one", "two"], ["a boat"]]
    assert made.masks[:, 0].tolist() == [[1, 0], [1, 0], [1, 1]]
    assert asked.held_out_examples(Base(), part) is None
