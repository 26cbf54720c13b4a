"""The demo base in ComfyUI's own classes computes what diffusers and transformers compute."""

import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difflora_core.demo.networks.base import load_base, time_ids

CAPTIONS = ["photo portrait of a young woman with red hair", "a man smiling, wearing a hat", ""]


@pytest.fixture(scope="module")
def base_file(demo_world):
    return demo_world / "base.safetensors"


@pytest.fixture(scope="module")
def reference(base_file):
    return load_base(base_file)


@pytest.fixture(scope="module")
def demo(node_module):
    return node_module("host.demo")


@pytest.fixture(scope="module")
def text(demo, base_file):
    clip = demo.load_demo_clip(base_file)

    def encode(caption):
        return clip.encode_from_tokens(clip.tokenize(caption), return_pooled=True)

    with torch.inference_mode():
        pairs = [encode(caption) for caption in CAPTIONS]
    return [torch.cat(part).float() for part in zip(*pairs, strict=True)]


def test_text_is_the_same(reference, text):
    expected = reference.encode_prompts(CAPTIONS)
    torch.testing.assert_close(text[0], expected.context, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(text[1], expected.pooled, atol=1e-4, rtol=1e-4)


def test_word_outside_the_vocabulary_is_the_unknown_word(demo, base_file):
    state, _ = demo.read_demo_file(base_file)
    prefix = demo.TEXT["clip_l"]
    table = demo.clip_state(state, prefix)["text_model.embeddings.token_embedding.weight"]
    unknown = state["vocabulary"].tolist().index(-1)
    name = next(k for k in state if k.startswith(prefix) and k.endswith("token_embedding.weight"))
    assert table.shape[0] == 49408
    torch.testing.assert_close(table[30000], state[name][unknown])


@pytest.mark.parametrize("wrong", ["missing", "unknown", "size mismatch"])
@pytest.mark.parametrize(
    ("load", "name"),
    [
        ("load_demo_unet", "model.diffusion_model.out.0.weight"),
        ("load_demo_vae", "first_stage_model.decoder.conv_in.weight"),
        ("load_demo_clip", "conditioner.embedders.1.transformer.text_projection.weight"),
        (
            "load_demo_clip",
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        ),
    ],
)
def test_a_file_whose_tensors_do_not_fit_is_refused(demo, base_file, tmp_path, load, name, wrong):
    with safe_open(base_file, "pt") as file:
        facts = file.metadata()
    tensors = load_file(base_file)
    if wrong == "missing":
        del tensors[name]
    elif wrong == "unknown":
        tensors[f"{name}.more"] = torch.ones(1)
    else:
        tensors[name] = tensors[name].new_ones(7, 7)
    path = tmp_path / "base.safetensors"
    save_file(tensors, path, metadata=facts)
    why = f"{re.escape(str(path))} does not fit its own configuration[^$]*{wrong}[^$]*Make it again"
    with pytest.raises(Exception, match=why) as caught:
        getattr(demo, load)(path)
    assert type(caught.value).__name__ == "CheckpointError"


def test_unet_is_the_same(comfyui, demo, reference, base_file, text):
    import comfy.model_management

    patcher = demo.load_demo_unet(base_file)
    comfy.model_management.load_models_gpu([patcher])
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(3, 8, 16, 16, generator=generator)
    steps = torch.tensor([40, 500, 980])
    added = {"text_embeds": text[1], "time_ids": time_ids(noisy)}
    with torch.no_grad():
        expected = reference.unet(noisy, steps, text[0], added_cond_kwargs=added).sample
        model = patcher.model
        label = model.encode_adm(
            **{"device": noisy.device, "pooled_output": text[1]}, width=128, height=128
        )
        actual = model.diffusion_model(noisy, steps, context=text[0], y=label)
    torch.testing.assert_close(actual.float(), expected, atol=1e-4, rtol=1e-4)
    assert model.model_type.name == "V_PREDICTION"
    assert model.concat_keys == ()


def test_vae_is_the_same(demo, reference, base_file):
    vae = demo.load_demo_vae(base_file)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(2, 64, 64, 3, generator=generator)
    latents = torch.randn(2, 8, 16, 16, generator=generator)
    with torch.no_grad():
        planes = pixels.movedim(-1, 1) * 2 - 1
        mean = reference.vae.encode(planes).latent_dist.mean
        picture = reference.vae.decode(latents).sample.movedim(1, -1) / 2 + 0.5
        torch.testing.assert_close(vae.encode(pixels), mean, atol=1e-4, rtol=1e-4)
        decoded = vae.decode(latents)
    torch.testing.assert_close(decoded, picture.clamp(0, 1), atol=1e-4, rtol=1e-4)
    assert vae.latent_channels == 8
    assert vae.spacial_compression_decode() == 4


def test_latents_are_scaled_as_the_base_was_trained(demo, base_file):
    state, facts = demo.read_demo_file(base_file)
    config = demo.demo_model_config(state, facts)
    latent = torch.randn(1, 8, 16, 16)
    scaled = config.latent_format.process_in(latent)
    torch.testing.assert_close(scaled, latent * facts["vae"]["scaling_factor"])
    assert not config.inpaint_model()


def test_clip_vision_is_the_same(demo, demo_world):
    from difflora_core.demo.networks.clip_vision import load_clip_vision
    from difflora_core.vision.image_encoder import ClipImageEncoder

    path = demo_world / "clip_vision.safetensors"
    pixels = torch.rand(2, 80, 64, 3, generator=torch.Generator().manual_seed(3))
    expected = ClipImageEncoder(load_clip_vision(path)[0]).encode(pixels)
    with torch.inference_mode():
        output = demo.load_demo_clip_vision(path).encode_image(pixels)
    torch.testing.assert_close(output.image_embeds.float(), expected[0], atol=1e-4, rtol=1e-4)
    states = output.penultimate_hidden_states.float()
    torch.testing.assert_close(states, expected[1], atol=1e-4, rtol=1e-4)
