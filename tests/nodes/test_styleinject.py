"""StyleInject on ComfyUI's models: on outputs, in order, by part and time; files and exports."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn


@pytest.fixture
def random_style(random_adaptation):
    """Makes random styles."""
    return random_adaptation("styleinject")


@pytest.fixture
def apply(node_module):
    """Apply Style as a graph calls it; returns the model."""
    node = node_module("styles").ApplyStyle

    def on(model, style, strength=1.0, **changes):
        widgets = {
            "start_percent": 0.0, "end_percent": 1.0, "positive_only": False,
            "input_blocks": 1.0, "middle_block": 1.0, "output_blocks": 1.0,
            "self_attention": 1.0, "cross_attention": 1.0,
        }  # fmt: skip
        return node.execute(model, style, strength, **(widgets | changes)).result[0]

    return on


@torch.no_grad()
def call(model, sigma=5.0, load=True, prompts=()):
    """One call of a model for a negative and a positive prompt, as ComfyUI's sampler makes it."""
    import comfy.model_management as management

    if load:
        management.load_models_gpu([model], force_patch_weights=True)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 8, 16, 16, generator=generator)
    width = model.model.model_config.unet_config["context_dim"]
    context = torch.randn(2, 7, width, generator=generator)
    marks = {"difflora_negative": torch.tensor([1.0, 0.0])} if model.wrappers else {}
    return model.model.apply_model(
        x, torch.full((2,), sigma), c_crossattn=context, y=torch.zeros(2, 1600),
        transformer_options={"wrappers": model.wrappers, "cond_or_uncond": list(prompts)}, **marks,
    )  # fmt: skip


def written_out(layer, name, strength):
    """A hook that does one layer's equations sample by sample in float64."""
    tensors = {k: t.double() for k, t in layer.items()}
    n, r = len(tensors["router"]), tensors["up"].shape[1]

    def hook(module, args, y):
        x, made = args[0].double(), []
        for xb, yb in zip(x, y.double(), strict=True):
            tokens = xb.flatten(1).T if xb.ndim == 3 else xb
            h = yb.flatten(1).T if yb.ndim == 3 else yb
            s = (tensors["router"] @ tokens.mean(0)).softmax(0)
            if isinstance(module, nn.Conv2d):
                patches = nn.functional.unfold(xb[None], 3, 1, 1, module.stride)[0].T
            else:
                patches = tokens
            downs = tensors["downs"].flatten(1).view(n, r, -1)
            change = patches @ (s[:, None, None] * downs).sum(0).T @ tensors["up"].T
            change = change * tensors["alpha"] / r
            if "spread" in tensors:
                gamma = (tensors["spread"] @ s + tensors["spread_bias"]).clamp_min(-0.95)
                mean = 0 if name.endswith("attn2.to_v") else h.mean(0)
                change = change + gamma * (h - mean)
            h = h + strength * change
            made.append(h.T.reshape(yb.shape) if yb.ndim == 3 else h)
        return torch.stack(made).to(y.dtype)

    return hook


@contextmanager
def written(model, *steps):
    """A fresh model with these (style, strength) written out."""
    handles = []
    for style, strength in steps:
        for name, layer in style.adaptation.layers.items():
            module = model.model.diffusion_model.get_submodule(name)
            handles.append(module.register_forward_hook(written_out(layer, name, strength)))
    yield
    for handle in handles:
        handle.remove()


def by_hand(model, *steps):
    """A call of a fresh model with these (style, strength) written out."""
    with written(model, *steps):
        return call(model)


def close(got, wanted, bare):
    """The same to rounding, and far from the model without it."""
    assert float((wanted - bare).abs().max()) > 0.05
    assert float((got - wanted).norm() / (wanted - bare).norm()) < 2e-3


def test_styles_are_their_equations_in_their_order_and_leave_the_model_alone(
    unet, random_style, apply
):
    model, one, two = unet(), random_style(1), random_style(2)
    bare = call(model)
    for strength in (1.0, 0.4, -0.5):
        close(call(apply(model, one, strength)), by_hand(unet(), (one, strength)), bare)
        assert torch.equal(call(model), bare)
    first = apply(model, one)
    both = call(apply(first, two, 0.7))
    close(both, by_hand(unet(), (one, 1.0), (two, 0.7)), bare)
    other = call(apply(apply(model, two, 0.7), one))
    assert float((other - both).norm() / (both - bare).norm()) > 0.01  # the order matters
    again = call(apply(first, two, 0.7))
    assert torch.equal(again, both)  # two clones of one model
    assert torch.equal(call(apply(model, one, 0.0)), bare)
    assert torch.equal(call(model), bare)


def test_parts_time_and_prompts(unet, random_style, apply):
    model, style = unet(), random_style(1)
    bare, full = call(model), call(apply(model, style))
    late = apply(model, style, start_percent=0.6)
    assert torch.equal(call(late), bare)  # noise level 5 comes before that
    positive = call(apply(model, style, positive_only=True))
    assert torch.equal(positive[0], bare[0])
    torch.testing.assert_close(positive[1], full[1], atol=1e-4, rtol=1e-4)
    nowhere = {"input_blocks": 0.0, "middle_block": 0.0, "output_blocks": 0.0}
    assert torch.equal(call(apply(model, style, **nowhere)), bare)
    kept = {
        name: tensors
        for name, tensors in style.adaptation.layers.items()
        if name.startswith("output_blocks")
    }
    alone = replace(style, adaptation=replace(style.adaptation, layers=kept))
    one_block = call(apply(model, style, input_blocks=0.0, middle_block=0.0))
    torch.testing.assert_close(one_block, call(apply(model, alone)))
    both = call(apply(apply(model, style, cross_attention=0.0), style, self_attention=0.0))
    assert float((both - full).abs().max()) > 0.01  # neighbours keep factors of their own


def test_beside_a_lora_of_weights(unet, random_style, apply):
    """A LoRA is in the plain output that the style sees."""
    import comfy.model_management

    style, key = (
        random_style(1),
        "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight",
    )
    patched, by_weights = unet().clone(), unet()
    weight = by_weights.model.get_parameter(key)
    change = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    assert patched.add_patches({key: ("diff", (change,))})
    weight.data += change.to(weight)
    close(call(apply(patched, style)), by_hand(by_weights, (style, 1.0)), call(unet()))
    comfy.model_management.unload_all_models()


def test_a_style_of_another_base_is_refused_by_name(unet, random_style, apply):
    style = random_style(1)
    layers = {f"input_blocks.99.{n}": t for n, t in style.adaptation.layers.items()}
    other = replace(style, adaptation=replace(style.adaptation, base="sd9", layers=layers))
    with pytest.raises(Exception, match=r"styleinject adaptation was made for sd9.*do not fit"):
        apply(unet(), other)
    small = {n: {**t, "downs": t["downs"][..., :-1], "router": t["router"][..., :-1]}
             for n, t in style.adaptation.layers.items() if t["downs"].ndim == 2}  # fmt: skip
    other = replace(style, adaptation=replace(style.adaptation, base="sd9", layers=small))
    with pytest.raises(Exception, match=r"made for sd9"):
        apply(unet(), other)


def test_its_lora_is_what_core_loads(unet, random_style, apply, node_module):
    """A style of one and without another spread is a LoRA, convolutions too; others say so."""
    import comfy.lora
    import comfy.sd

    export = node_module("styles").ExportStyleLoRA
    model, plain = unet(), random_style(1, styles=1, spread=False)
    lora, report = export.execute(model, plain).result
    assert report == "The LoRA is the whole style."
    loaded, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert len(loaded.patches) == len(plain.adaptation.layers)
    close(call(loaded), call(apply(unet(), plain)), call(unet()))
    rich = random_style(1)
    count = sum("spread" in tensors for tensors in rich.adaptation.layers.values())
    report = export.execute(model, rich).result[1]
    assert report == (
        "As a LoRA, its 3 styles are mixed evenly, whatever the picture, and "
        f"the spread of the base model stays in {count} layers."
    )


def test_files_of_styles_and_of_words_are_told_apart(
    parts, random_style, node_module, tmp_path, monkeypatch
):
    storage, paths = parts("difflora_core.storage.adapter_file"), node_module("model_paths")
    style = replace(random_style(1).adaptation, facts={"steps": 7})
    path = storage.write_adaptation(tmp_path / "mine.safetensors", style).path
    monkeypatch.setattr(paths, "style_file", lambda name: str(path))
    load = node_module("styles").LoadStyle
    loaded, report = load.execute("mine.safetensors").result
    assert report == f"styleinject, for demo, {len(style.layers)} layers, steps 7"
    assert set(loaded.adaptation.layers) == set(style.layers)
    concept = next(
        parts("difflora_core.demo.paths").ARTEFACTS.glob("**/concepts/*.safetensors"), None
    )
    if concept is None:
        pytest.skip("the demo world has no concepts")
    monkeypatch.setattr(paths, "style_file", lambda name: str(concept))
    with pytest.raises(Exception, match=r"is a concept.*Load Concept"):
        load.execute("concept.safetensors")


def test_held_out_pictures_are_spread_over_the_list_and_keep_their_prompts(parts, node_module):
    request = node_module("host.training_request")

    class Base:
        def encode_images(self, images):
            return images.permute(0, 3, 1, 2)

    images = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 2, 2, 3)
    part = request.PictureParts(None, None, None, images, None, None)
    own = "\n".join(f"picture {k}" for k in range(10))
    asked = request.HeldOutRequest(own, "a", False, False, 20)
    trained = asked.examples(Base(), part)
    held = asked.held_out_examples(Base(), part)
    assert held.latents[:, 0, 0, 0].tolist() == [0, 5]
    assert trained.latents[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
    assert [list(p) for p in held.prompts] == [["picture 0"], ["picture 5"]]
    assert list(trained.prompts[3]) == ["picture 4"]
    one = request.PictureParts(None, None, None, images[:1], None, None)
    assert asked.held_out_examples(Base(), one) is None
    shared = request.HeldOutRequest("a\nb", "a", True, False, 0)
    assert shared.held_out_examples(Base(), part) is None
    assert len(shared.examples(Base(), part)) == 20
    assert list(shared.examples(Base(), part).prompts[0]) == ["a", "b"]


def test_pictures_of_a_folder_come_after_those_that_are_connected(node_module, tmp_path):
    from PIL import Image

    request = node_module("host.training_request")

    class Base:
        def encode_images(self, images):
            return images.permute(0, 3, 1, 2)

    for k in range(3):
        Image.new("RGB", (4 + 2 * k, 4), (100 + k, 0, 0)).save(tmp_path / f"{k}.png")
    (tmp_path / "1.txt").write_text("a boat", "utf-8")
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 2, 3)
    part = request.PictureParts(None, None, None, images, None, None)
    more = tuple(sorted(tmp_path.glob("*.png")))
    asked = request.HeldOutRequest("one\ntwo\nthree", "a", False, False, 33, more=more)
    held, trained = asked.held_out_examples(Base(), part), asked.examples(Base(), part)
    read = [round(float(x) * 255) for x in held.latents[:, 0, 0, 0]]
    assert read == [0, 100]  # the first that is connected, and the first of the folder
    read = [round(float(x) * (1 if x > 0.9 else 255)) for x in trained.latents[:, 0, 0, 0]]
    assert read == [1, 2, 101, 102]
    lines = ["one", "two", "three"]
    assert [list(p) for p in trained.prompts] == [["two"], ["three"], ["a boat"], lines]
    assert trained.latents.shape[-2:] == (2, 2)


def test_weights_off_the_device(unet, random_style, apply):
    """Partly loaded, as with little video memory: the same as fully loaded."""
    outputs = []
    for memory in (0, 1):
        model = apply(unet(), random_style(1))
        model.load(torch.device("cpu"), lowvram_model_memory=memory, full_load=memory == 0)
        outputs.append(call(model, load=False))
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-3, rtol=2e-3)
    assert float((outputs[0] - call(unet())).abs().max()) > 0.05


@pytest.mark.parametrize("first", [True, False])
def test_compiled(unet, random_style, apply, first):
    """Torch Compile Model before or after the style: the picture that it draws uncompiled."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model, style = unet(), random_style(1)
    bare, wanted = call(model), call(apply(model, style))
    compiled = model.clone() if first else apply(model, style)
    set_torch_compile_wrapper(compiled, backend="eager")
    call(compiled)
    close(call(apply(compiled, style) if first else compiled), wanted, bare)


def test_fp8_weights(unet, random_style, apply, monkeypatch):
    """As the plain model with numbers rounded alike: outputs are not rounded again."""
    import comfy.model_management as management

    plain, style = unet(), random_style(1)
    for parameter in plain.model.diffusion_model.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn).to(parameter.dtype)
    bare, wanted = call(plain), by_hand(plain, (style, 1.0))
    monkeypatch.setattr(management, "unet_dtype", lambda *_, **__: torch.float8_e4m3fn)
    small = unet()
    assert {p.dtype for p in small.model.diffusion_model.parameters()} == {torch.float8_e4m3fn}
    assert float((call(apply(small, style)) - wanted).norm() / (wanted - bare).norm()) < 0.02


@torch.no_grad()
def test_a_region_is_drawn_as_a_picture_of_its_own(unet, random_style, apply):
    """ComfyUI hands over the part of the picture; its mean, spread and mixture are the part's."""
    import comfy.conds
    import comfy.model_management as management
    import comfy.samplers

    style, plain = random_style(1), unet()
    model = apply(unet(), style)
    management.load_models_gpu([model], force_patch_weights=True)
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(1, 8, 16, 16, generator=generator), torch.full((1,), 5.0)
    width = model.model.model_config.unet_config["context_dim"]
    text, sizes = torch.randn(1, 7, width, generator=generator), torch.zeros(1, 1600)

    def region(left):
        parts = {
            "c_crossattn": comfy.conds.CONDCrossAttn(text), "y": comfy.conds.CONDRegular(sizes),
            "difflora_negative": comfy.conds.CONDRegular(torch.zeros(1)),
        }  # fmt: skip
        return {"model_conds": parts, "area": (16, 8, 0, left), "uuid": left}

    model.model.current_patcher = model
    options = {"transformer_options": {"wrappers": model.wrappers}}
    (got,) = comfy.samplers.calc_cond_batch(model.model, [[region(0), region(8)]], x, t, options)
    for part in (slice(0, 8), slice(8, 16)):
        with written(plain, (style, 1.0)):
            wanted = plain.model.apply_model(x[..., part], t, c_crossattn=text, y=sizes)
        bare = plain.model.apply_model(x[..., part], t, c_crossattn=text, y=sizes)
        close(got[..., part], wanted, bare)


@torch.no_grad()
def test_what_the_router_shows_is_what_the_positive_prompt_got(parts, unet, random_style, apply):
    watcher, style = parts("nodes.host.routing").RoutingWatcher(), random_style(1)
    one = parts("difflora_core.adapters.styleinject").StyleInjectAdapter
    config = parts("difflora_core.adapters.styleinject").StyleInjectConfig()
    layers = parts("difflora_core.methods.styleinject").style_layers(style.adaptation)
    model, seen = unet(), {}

    def keep(name):
        def hook(module, args, y):
            seen[name] = one(layers[name], config).styles(args[0])[1]  # a negative one is first

        return hook

    watched = watcher.on(apply(apply(model, style), random_style(2)))
    for name in layers:
        model.model.diffusion_model.get_submodule(name).register_forward_hook(keep(name))
    call(watched, prompts=[1, 0])
    shares = watcher.table.shares()
    first = {name: table for name, table in shares.items() if " " not in name}
    assert set(first) == set(layers)
    assert len(shares) == 2 * len(layers)
    for name, table in first.items():
        torch.testing.assert_close(table, seen[name][None].float().cpu(), atol=1e-4, rtol=1e-4)
