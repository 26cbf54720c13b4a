"""SDXL from local files: names of the real checkpoint, values by other roads, and faults."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from difflora_core.demo import paths
from difflora_core.demo.networks.base import UNET_CONFIG, load_base
from difflora_core.errors import CheckpointError
from difflora_core.storage import sdxl_checkpoint
from difflora_core.storage.safetensors_io import open_tensors
from difflora_core.storage.sdxl_checkpoint import TEXT_CONFIGS, load_sdxl

CPU = torch.device("cpu")
SMALL_TEXT = [
    {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    | {"num_hidden_layers": 2, "hidden_act": act, "projection_dim": 32}
    for act in ("quick_gelu", "gelu")
]


def text_config(sizes):
    return CLIPTextConfig(
        **sizes, vocab_size=49408, max_position_embeddings=77, bos_token_id=49406,
        eos_token_id=49407,
    )  # fmt: skip


def test_every_weight_of_the_real_checkpoint_is_asked_for_and_fits(comfyui):
    """Against the names and shapes that ComfyUI's own classes hold."""
    command = [sys.executable, str(paths.ROOT / "benchmarks/cost/sdxl/shapes.py"), str(comfyui)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shapes = json.loads(done.stdout.splitlines()[-1])["checkpoints"]
    asked = set()

    def read(name, finite=True):
        asked.add(name)
        return torch.empty(shapes[name], device="meta")

    file = SimpleNamespace(header=SimpleNamespace(tensors=shapes), read=read)
    with torch.device("meta"):
        networks = (
            UNet2DConditionModel(**sdxl_checkpoint.SDXL_UNET_CONFIG),
            AutoencoderKL(**sdxl_checkpoint.VAE_CONFIG),
            CLIPTextModel(text_config(TEXT_CONFIGS[0])),
            CLIPTextModelWithProjection(text_config(TEXT_CONFIGS[1])),
        )
    readers = ("unet_tensors", "vae_tensors", "clip_tensors", "open_clip_tensors")
    for network, reader in zip(networks, readers, strict=True):
        own = network.state_dict()
        found = getattr(sdxl_checkpoint, reader)(file)
        there = {sdxl_checkpoint._as_here(n, own): tuple(t.shape) for n, t in found.items()}
        assert there == {n: tuple(t.shape) for n, t in own.items()}
    assert set(shapes) - asked == {"conditioner.embedders.1.model.logit_scale"}


def test_values_of_a_unet_of_ldm_names(monkeypatch):
    """The demo's base has the same names; another reader gives the same weights."""
    monkeypatch.setattr(sdxl_checkpoint, "SDXL_UNET_CONFIG", UNET_CONFIG)
    with open_tensors(paths.BASE, "base") as file:
        found = sdxl_checkpoint.unet_tensors(file)
        half = sdxl_checkpoint.unet_tensors(file, torch.bfloat16)
    wanted = load_base(paths.BASE).unet.state_dict()
    assert {t.dtype for t in half.values()} == {torch.bfloat16}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


PREFIX, D = sdxl_checkpoint.TEXT_G, 32


@pytest.fixture
def open_clip():
    """Random weights of a small OpenCLIP text tower, as SDXL's checkpoint names them."""
    g = torch.Generator().manual_seed(0)
    shapes = {"positional_embedding": (77, D), "token_embedding.weight": (49408, D)}
    shapes |= {"text_projection": (D, D), "ln_final.weight": (D,), "ln_final.bias": (D,)}
    for layer in range(2):
        at = f"transformer.resblocks.{layer}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{at}{norm}.weight": (D,), f"{at}{norm}.bias": (D,)}
        shapes |= {f"{at}attn.in_proj_weight": (3 * D, D), f"{at}attn.in_proj_bias": (3 * D,)}
        for name, out, inner in (
            ("attn.out_proj", D, D),
            ("mlp.c_fc", 2 * D, D),
            ("mlp.c_proj", D, 2 * D),
        ):
            shapes |= {f"{at}{name}.weight": (out, inner), f"{at}{name}.bias": (out,)}
    return {PREFIX + name: torch.randn(shape, generator=g) / 4 for name, shape in shapes.items()}


def pooled_by_hand(stored, ids, end):
    """What OpenCLIP computes, by torch's own MultiheadAttention with the joined weights."""
    x = stored[f"{PREFIX}token_embedding.weight"][ids]
    x = x + stored[f"{PREFIX}positional_embedding"][: ids.shape[1]]
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
    for layer in range(2):
        at = f"{PREFIX}transformer.resblocks.{layer}."

        def own(name, at=at):
            return stored[f"{at}{name}weight"], stored[f"{at}{name}bias"]

        attention = torch.nn.MultiheadAttention(D, 2, batch_first=True)
        for part, name in (("in_proj_", "attn.in_proj_"), ("out_proj.", "attn.out_proj.")):
            weight, bias = own(name)
            attention.load_state_dict({f"{part}weight": weight, f"{part}bias": bias}, strict=False)
        h = F.layer_norm(x, (D,), *own("ln_1."))
        x = x + attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = F.gelu(F.linear(F.layer_norm(x, (D,), *own("ln_2.")), *own("mlp.c_fc.")))
        x = x + F.linear(h, *own("mlp.c_proj."))
    x = F.layer_norm(x, (D,), stored[f"{PREFIX}ln_final.weight"], stored[f"{PREFIX}ln_final.bias"])
    return x[:, end] @ stored[f"{PREFIX}text_projection"]


@torch.no_grad()
def test_values_of_an_open_clip(tmp_path, monkeypatch, open_clip):
    monkeypatch.setattr(sdxl_checkpoint, "TEXT_CONFIGS", SMALL_TEXT)
    save_file(open_clip, tmp_path / "g.safetensors")
    with open_tensors(tmp_path / "g.safetensors", "text") as file:
        model = sdxl_checkpoint._filled(
            file,
            lambda: CLIPTextModelWithProjection(text_config(SMALL_TEXT[1])),
            sdxl_checkpoint.open_clip_tensors,
            torch.float32,
        ).eval()
    ids = torch.tensor([[49406, 320, 1125, 49407, 0]])
    assert torch.allclose(model(ids).text_embeds, pooled_by_hand(open_clip, ids, 3), atol=1e-4)


def test_a_folder_encodes_prompts_as_diffusers_does(tiny_sdxl):
    folder, pipe = tiny_sdxl
    loaded = load_sdxl(folder, None, CPU, torch.float32)
    prompts = ["a photo of a person, smiling", ""]
    found = loaded.encode_prompts(prompts)
    for row, prompt in enumerate(prompts):
        context, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        assert torch.allclose(found.context[row], context[0], atol=1e-5)
        assert torch.allclose(found.pooled[row], pooled[0], atol=1e-5)
    assert loaded.prediction_type == "v_prediction"
    assert not any(p.requires_grad for p in loaded.unet.parameters())
    half = load_sdxl(folder, None, CPU)
    assert next(half.unet.parameters()).dtype == torch.bfloat16
    assert next(half.vae.parameters()).dtype == torch.float32


def test_faults_are_named(tiny_sdxl, tmp_path):
    folder, _ = tiny_sdxl
    words = folder / "tokenizer"
    for path, tokenizer, said in (
        (tmp_path, words, "is no SDXL pipeline"),
        (tmp_path / "gone.safetensors", words, "no SDXL checkpoint at"),
        (paths.BASE, words, "is no SDXL checkpoint"),
        (folder, tmp_path, "lacks CLIP's tokenizer"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load_sdxl(path, tokenizer, CPU)
