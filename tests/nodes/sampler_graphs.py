"""Graphs of ComfyUI's samplers and guiders, by the model and the prompts that are given to them."""

import numpy as np

MODEL, CLIP, VAE = (["demo", k] for k in range(3))
ROUNDING = 2  # grey levels between the same arithmetic in another order
VISIBLE = 8  # grey levels
WHOLE = {
    "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "positive_only": False,
    "input_blocks": 1.0, "middle_block": 1.0, "output_blocks": 1.0, "self_attention": 1.0,
    "cross_attention": 1.0,
}  # fmt: skip


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def apply_lora(model=MODEL, lora="lora", **changes):
    return node("DiffLoRA_ApplyLoRA", model=model, lora=[lora, 0], **(WHOLE | changes))


def invented_lora(seed=3):
    """Nodes of a person's LoRA, named by the seed: `lora` is that of 3."""
    end = "" if seed == 3 else str(seed)
    return {
        f"latent{end}": node(
            "DiffLoRA_InventIdentity", difflora_model=["demo", 5], seed=seed, count=1, steps=4,
            guidance=1.0,
        ),
        f"lora{end}": node(
            "DiffLoRA_DecodeLoRA", difflora_model=["demo", 5], lora_latent=[f"latent{end}", 0]
        ),
    }  # fmt: skip


def hooked(words, hooks, **mask):
    """A prompt with hooks on it, in a mask where one is given."""
    return node(
        "ConditioningSetProperties", cond_NEW=words, strength=1.0, set_cond_area="default",
        hooks=hooks, **mask,
    )  # fmt: skip


def sampling_nodes(sampler="euler", scheduler="normal", side=64):
    """What a guider needs beside its model and prompts."""
    return {
        "noise": node("RandomNoise", noise_seed=3),
        "sampler": node("KSamplerSelect", sampler_name=sampler),
        "steps": node("BasicScheduler", model=MODEL, scheduler=scheduler, steps=3, denoise=1.0),
        "empty": node("EmptyLatentImage", width=side, height=side, batch_size=2),
    }  # fmt: skip


def cfg(model, positive, negative=("none", 0), scale=2.0):
    return node("CFGGuider", model=model, positive=positive, negative=list(negative), cfg=scale)


def dual_cfg(model, positive, negative=("none", 0)):
    """Two equal prompts: CFG at 2."""
    return node(
        "DualCFGGuider", model=model, cond1=positive, cond2=positive, negative=list(negative),
        cfg_conds=3.0, cfg_cond2_negative=2.0, style="regular",
    )  # fmt: skip


def perp_neg(model, positive, negative=("none", 0)):
    return node(
        "PerpNegGuider", model=model, positive=positive, negative=list(negative),
        empty_conditioning=list(negative), cfg=2.0, neg_scale=0.7,
    )  # fmt: skip


def dual_model(model, positive, negative=("none", 0), other=MODEL):
    """The negative prompt by another model."""
    return node(
        "DualModelGuider", model=model, model_negative=other, positive=positive,
        negative=list(negative), cfg=2.0,
    )  # fmt: skip


def basic(model, positive, negative=None):
    """No negative prompt."""
    del negative
    return node("BasicGuider", model=model, conditioning=positive)


def shown(name, latent):
    """Nodes that show a latent as the pictures `name`."""
    return {
        f"{name}_decoded": node("VAEDecode", samples=latent, vae=VAE),
        name: node("PreviewImage", images=[f"{name}_decoded", 0]),
    }


def guided(name, guider, latent="empty"):
    """Nodes that draw with a guider; needs `sampling_nodes`."""
    return {
        f"{name}_guider": guider,
        f"{name}_latent": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=[f"{name}_guider", 0],
            sampler=["sampler", 0], sigmas=["steps", 0], latent_image=[latent, 0],
        ),
        **shown(name, [f"{name}_latent", 0]),
    }  # fmt: skip


def difference(a, b):
    """Largest difference in grey levels over all pictures."""
    return max(int(np.abs(x.astype(int) - y.astype(int)).max()) for x, y in zip(a, b, strict=True))
