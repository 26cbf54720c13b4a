"""LoRA files from programs that make them: ComfyUI's own trainer, and PEFT through diffusers."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict

from benchmarks.files.lora_files import WHOLE, Host
from difflora_core.demo import paths
from difflora_core.demo.networks.base import load_base
from difflora_core.lora.formats.state_dict import with_peft_alphas
from difflora_core.storage.lora_file import read_lora_file

MODEL, CLIP, VAE = (["demo", k] for k in range(3))
PLAIN = {
    "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "positive_only": False,
    "input_blocks": 1.0, "middle_block": 1.0, "output_blocks": 1.0, "self_attention": 1.0,
    "cross_attention": 1.0,
}  # fmt: skip
ROUNDING = 2  # grey levels between the same arithmetic in another order


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def picture(name, model):
    sampler = node(
        "KSampler", model=model, positive=["words", 0], negative=["none", 0],
        latent_image=["empty", 0], seed=3, steps=3, cfg=2.0, sampler_name="euler",
        scheduler="simple", denoise=1.0,
    )  # fmt: skip
    return {
        f"{name}_s": sampler,
        f"{name}_d": node("VAEDecode", samples=[f"{name}_s", 0], vae=VAE),
        name: node("SaveImage", images=[f"{name}_d", 0], filename_prefix=name),
    }


@pytest.mark.parametrize(
    ("algorithm", "bypass"), [("LoRA", False), ("LoRA", True), ("LoHa", False), ("LoKr", False),
                              ("OFT", False)],
)  # fmt: skip
def test_core_trainer(comfy, face_picture, algorithm, bypass):
    """Every layer of the network: attention, convolutions, norms and biases."""
    nodes = {
        "demo": node("DiffLoRA_LoadDemo"),
        "words": node("CLIPTextEncode", clip=CLIP, text="photo of a person, smiling"),
        "none": node("CLIPTextEncode", clip=CLIP, text=""),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "photo": node("LoadImage", image=comfy.upload_picture(face_picture)),
        "seen": node("VAEEncode", pixels=["photo", 0], vae=VAE),
        "trained": node(
            "TrainLoraNode", model=MODEL, latents=["seen", 0], positive=["words", 0],
            batch_size=1, grad_accumulation_steps=1, steps=2, learning_rate=0.02, rank=4,
            optimizer="AdamW", loss_function="MSE", seed=1, training_dtype="fp32",
            lora_dtype="fp32", quantized_backward=False, algorithm=algorithm,
            gradient_checkpointing=False, checkpoint_depth=1, offloading=False,
            existing_lora="[None]", bucket_mode=False, bypass_mode=bypass,
        ),
        "core": node(
            "LoraModelLoader", model=MODEL, lora=["trained", 0], strength_model=1.0, bypass=False
        ),
    }  # fmt: skip
    ours = dict(model=MODEL, lora=["trained", 0])
    nodes |= {"ours": node("DiffLoRA_ApplyLoRA", **ours, **PLAIN)}
    off = {name: 0.0 for name in ("input_blocks", "middle_block", "output_blocks")}
    nodes |= {"outer": node("DiffLoRA_ApplyLoRA", **ours, **(PLAIN | off))}
    nodes |= (
        picture("base", MODEL) | picture("by_core", ["core", 0]) | picture("by_us", ["ours", 0])
    )
    nodes |= picture("rest", ["outer", 0])
    if algorithm != "OFT":
        nodes["timed"] = node("DiffLoRA_ApplyLoRA", **ours, **(PLAIN | {"end_percent": 0.999}))
        nodes |= picture("beside", ["timed", 0])
    shown = comfy.run(nodes).pictures
    gap = lambda a, b: int(np.abs(shown[a][0].astype(int) - shown[b][0].astype(int)).max())  # noqa: E731
    assert gap("by_core", "base") > 8
    assert gap("by_us", "by_core") == 0
    assert gap("rest", "by_core") > 2
    if algorithm != "OFT":
        assert gap("beside", "by_core") <= ROUNDING


CONFIGS = {
    "alpha": {"r": 4, "lora_alpha": 8},
    "rank-stabilised": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "alpha_pattern": {"attn2.to_k": 3},
        "rank_pattern": {"attn2.to_v": 2},
    },
    "rank pattern, rank-stabilised": {
        "r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"attn1.to_q": 9}
    },
    "with biases": {"r": 4, "lora_alpha": 8, "lora_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_through_diffusers(pack, tmp_path, name):
    """What PEFT itself adds to every layer is what our patches add, for every kind of alpha."""
    unet = load_base(paths.BASE).unet
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(target_modules=targets, **CONFIGS[name]))
    generator = torch.Generator().manual_seed(0)
    for key, parameter in unet.named_parameters():
        if "lora_" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    file = read_lora_file(tmp_path / "pytorch_lora_weights.safetensors")
    host = Host()
    state = with_peft_alphas(file.tensors, file.metadata)
    patched, _ = host.apply.execute(host.model, state, *WHOLE).args
    seen = 0
    for path, module in unet.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        layer = next(ldm for ldm, ours in host.diffusers.items() if ours == path)
        key = f"diffusion_model.{layer}.weight"
        zero = torch.zeros(host.state[key].shape)
        made = host.lora.calculate_weight(patched.patches[key], zero, key)
        torch.testing.assert_close(made, module.get_delta_weight("default"), rtol=1e-5, atol=1e-5)
        bias = f"diffusion_model.{layer}.bias"
        if CONFIGS[name].get("lora_bias") and bias in host.state:
            zero = torch.zeros(host.state[bias].shape)
            made = host.lora.calculate_weight(patched.patches[bias], zero, bias)
            wanted = module.scaling["default"] * module.lora_B["default"].bias
            torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
        seen += 1
    assert seen == 56
