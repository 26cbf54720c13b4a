"""Concepts on models as artists keep them: fp8 weights, and weights that stay off the device."""

import torch


def with_concept(parts, model):
    """A clone of the model with a random concept."""
    host, base = parts("nodes.host.adapters"), parts("nodes.host.base")
    methods, words = parts("difflora_core.methods.base"), parts("difflora_core.text.new_words")
    settings = parts("difflora_core.methods.perfusion").PerfusionConfig()
    generator = torch.Generator().manual_seed(1)
    layers = [s for s in base.unet_layout(model, "demo", 1) if s.name.endswith("attn2.to_v")]
    direction = torch.randn(layers[0].in_features, generator=generator)
    values = {s.name: {"values": torch.randn(s.out_features, generator=generator)} for s in layers}
    word = words.LearnedWord("<w>", "hat", (torch.ones(4), torch.ones(4)), torch.ones(4))
    shared = {"direction": direction, "covector": direction / direction.square().sum()}
    concept = methods.TrainedAdaptation("perfusion", "demo", settings, shared, values, word)
    prepared = methods.PreparedAdaptation(concept, direction.flip(0))
    applied = methods.AppliedAdaptation(prepared, settings)
    return host.with_link(model, host.Link(applied, positive_only=True)), direction


@torch.no_grad()
def call(model, word):
    """One call of a loaded model on a prompt whose third token is the word."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 8, 16, 16, generator=generator)
    context = torch.randn(1, 7, len(word), generator=generator)
    context[:, 2] = word
    options = {"wrappers": model.wrappers}  # as ComfyUI's sampler does
    pooled, negative = torch.zeros(1, 1600), {}
    if model.wrappers:
        negative["difflora_negative"] = torch.zeros(1)  # the mark of a prepared prompt
    return model.model.apply_model(
        x, torch.tensor([5.0]), c_crossattn=context, y=pooled, transformer_options=options,
        **negative,
    )  # fmt: skip


def test_fp8_weights(parts, unet, monkeypatch):
    """The same as on a plain model whose weights hold the rounded numbers."""
    import comfy.model_management as management

    plain = unet()
    for parameter in plain.model.diffusion_model.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn).to(parameter.dtype)
    changed, word = with_concept(parts, plain)
    expected, bare = call(changed, word), call(plain, word)
    monkeypatch.setattr(management, "unet_dtype", lambda *_, **__: torch.float8_e4m3fn)
    small = unet()
    linear = small.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_v
    assert linear.weight.dtype == torch.float8_e4m3fn
    changed, _ = with_concept(parts, small)
    got = call(changed, word)
    assert float((expected - bare).abs().max()) > 0.05
    assert float((got - expected).norm() / (expected - bare).norm()) < 0.05
    torch.testing.assert_close(call(small, word), bare, atol=0.02, rtol=0.02)


def test_weights_off_the_device(parts, unet):
    """Partly loaded, as with little video memory, under a LoRA: the same as fully loaded."""
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    outputs = []
    for memory in (0, 1):
        model, word = with_concept(parts, unet())
        shape = model.model.state_dict()[name].shape
        change = torch.full(shape, 0.01)
        assert model.add_patches({name: ("diff", (change,))}, 1.0)
        model.load(torch.device("cpu"), lowvram_model_memory=memory, full_load=memory == 0)
        cast = [m for m in model.model.modules() if getattr(m, "weight_function", None)]
        assert bool(cast) == bool(memory)  # the LoRA waits beside the weight until it is used
        outputs.append(call(model, word))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-4)
    assert float((outputs[0] - call(unet(), word)).abs().max()) > 0.05


def test_a_covariance_is_the_same_built_and_read(parts, tmp_path):
    """To the last digit, or a training after the first one would end elsewhere."""
    covariance = parts("nodes.host.covariance")
    (base, *_), _ = parts("nodes.model_paths").demo_paths()
    clip = parts("nodes.host.demo").load_demo_clip(base)
    request = covariance.CovarianceRequest("demo", 200, 0.01, False)
    built, read = (
        covariance.covariance_for(clip, tmp_path / "c.safetensors", request) for _ in "ab"
    )
    assert torch.equal(built.matrix, read.matrix)
    assert torch.equal(built.inverse, read.inverse)
