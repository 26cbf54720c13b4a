"""Where and when a LoRA acts, against the parts of ComfyUI that do the same in another way."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from difflora_core.comfy_client import ComfyPromptError
from difflora_core.demo.networks.base import demo_layout
from difflora_core.lora.formats.state_dict import to_state_dict
from difflora_core.lora.weights import LoRALayer, LoRAWeights

MODEL, CLIP, VAE, VISION, FACES, DIFFLORA = (["demo", k] for k in range(6))
WHOLE = {
    "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "positive_only": False,
    "input_blocks": 1.0, "middle_block": 1.0, "output_blocks": 1.0, "self_attention": 1.0,
    "cross_attention": 1.0,
}  # fmt: skip
PARTS = ("input_blocks", "middle_block", "output_blocks")
ROUNDING = 2  # grey levels between the same arithmetic in another order


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def apply(model=MODEL, lora=("lora", 0), **changes):
    return node("DiffLoRA_ApplyLoRA", model=model, lora=list(lora), **(WHOLE | changes))


def hook(lora=("lora", 0), strength=1.0, **sockets):
    return node("DiffLoRA_LoRAToHook", lora=list(lora), strength_model=strength, **sockets)


def on_both(hooks):
    """Core's way to put hooks on positive and negative prompt: outputs 0 and 1."""
    return node(
        "PairConditioningSetProperties", positive_NEW=["words", 0], negative_NEW=["none", 0],
        strength=1.0, set_cond_area="default", hooks=list(hooks),
    )  # fmt: skip


def picture(name, model=MODEL, positive=("words", 0), negative=("none", 0)):
    sampler = node(
        "KSampler", model=model, positive=list(positive), negative=list(negative),
        latent_image=["empty", 0], seed=3, steps=4, cfg=2.0, sampler_name="euler",
        scheduler="normal", denoise=1.0,
    )  # fmt: skip
    return {
        f"{name}_sampler": sampler,
        f"{name}_decoder": node("VAEDecode", samples=[f"{name}_sampler", 0], vae=VAE),
        name: node("SaveImage", images=[f"{name}_decoder", 0], filename_prefix=name),
    }


def difference(a, b):
    """Largest difference in grey levels."""
    return int(np.abs(a[0].astype(int) - b[0].astype(int)).max())


@pytest.fixture(scope="module")
def person(comfy, face_picture):
    """Nodes up to a person's LoRA, and what every picture needs."""
    inputs = {
        "images": ["photo", 0], "difflora_model": DIFFLORA, "clip_vision": VISION,
        "face_analysis": FACES, "mode": "best_guess", "seed": 0, "steps": 4, "guidance": 1.0,
        "on_missing_face": "error", "face_order": "largest", "face_index": 0,
        "image_region": "crop", "gate": "learned", "face_share": 0.5,
    }  # fmt: skip
    return {
        "photo": node("LoadImage", image=comfy.upload_picture(face_picture)),
        "demo": node("DiffLoRA_LoadDemo"),
        "lora": node("DiffLoRA_Personalize", **inputs),
        "words": node("CLIPTextEncode", clip=CLIP, text="photo of a person, smiling"),
        "none": node("CLIPTextEncode", clip=CLIP, text=""),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
    }


@pytest.fixture(scope="module")
def whole(comfy, person):
    """The base, core's loader and ours at its defaults, between two pictures of the base."""
    core = node("LoraModelLoader", model=MODEL, lora=["lora", 0], strength_model=0.8, bypass=False)
    nodes = {**person, "core": core, "ours": apply(strength=0.8)}
    nodes |= picture("before") | picture("by_core", ["core", 0]) | picture("by_us", ["ours", 0])
    nodes |= {"nowhere": apply(input_blocks=0.0, middle_block=0.0, output_blocks=0.0)}
    nodes |= picture("off", ["nowhere", 0]) | {"never": apply(start_percent=1.0)}
    nodes |= picture("too_late", ["never", 0]) | picture("after")
    return comfy.run(nodes).pictures


def test_defaults_are_cores_loader_and_the_base_stays(whole):
    assert difference(whole["by_us"], whole["before"]) > 8
    assert difference(whole["by_us"], whole["by_core"]) == 0
    for name in ("after", "off", "too_late"):
        assert difference(whole[name], whole["before"]) == 0, name


def test_hook_on_both_prompts_is_the_patch(comfy, person, whole):
    nodes = {**person, "hook": hook(strength=0.8, base_model=MODEL), "hooked": on_both(("hook", 0))}
    nodes |= {"half": hook(strength=0.5)}
    nodes |= {"chain": hook(strength=0.3, prev_hooks=["half", 0]), "two": on_both(("chain", 0))}
    nodes |= picture("one", MODEL, ("hooked", 0), ("hooked", 1))
    nodes |= picture("chained", MODEL, ("two", 0), ("two", 1))
    shown = comfy.run(nodes).pictures
    assert difference(shown["one"], whole["by_core"]) <= ROUNDING
    assert difference(shown["chained"], whole["by_core"]) <= ROUNDING


def test_hook_of_strength_zero_leaves_the_base(comfy, person, whole):
    nodes = {**person, "off": hook(strength=0.0), "hooked": on_both(("off", 0))}
    shown = comfy.run({**nodes, **picture("out", MODEL, ("hooked", 0), ("hooked", 1))}).pictures
    assert difference(shown["out"], whole["before"]) == 0


def keyframes(**starts):
    """Core's keyframes: strength at each share of the steps."""
    nodes, last = {}, None
    for name, (start, strength) in starts.items():
        before = {} if last is None else {"prev_hook_kf": [last, 0]}
        nodes[name] = node(
            "CreateHookKeyframe", strength_mult=strength, start_percent=start, **before
        )
        last = name
    nodes["scheduled"] = node("SetHookKeyframes", hooks=["hook", 0], hook_kf=[last, 0])
    return nodes


@pytest.mark.parametrize(
    ("start", "end", "frames"),
    [
        (0.5, 1.0, {"k0": (0.0, 0.0), "k1": (0.5, 1.0)}),
        (0.0, 0.5, {"k0": (0.0, 1.0), "k1": (0.5, 0.0)}),
    ],
)
def test_part_of_the_steps_is_what_keyframes_do(comfy, person, whole, start, end, frames):
    nodes = {**person, "timed": apply(start_percent=start, end_percent=end), "hook": hook()}
    nodes |= keyframes(**frames) | {"hooked": on_both(("scheduled", 0))}
    nodes |= picture("ours", ["timed", 0])
    nodes |= picture("cores", MODEL, ("hooked", 0), ("hooked", 1))
    shown = comfy.run(nodes).pictures
    assert difference(shown["ours"], shown["cores"]) <= ROUNDING
    assert difference(shown["ours"], whole["before"]) > 8
    assert difference(shown["ours"], whole["by_core"]) > 8


@pytest.mark.parametrize(
    ("start", "end", "told"),
    [(1.0, 1.0, "100% to 100%"), (0.0, 0.0, "0% to 0%"), (0.4, 0.4, "40% to 40%"), (0.0, 0.1, "")],
)
def test_a_span_without_a_step_is_told(comfy, person, start, end, told):
    nodes = {**person, "on": apply(start_percent=start, end_percent=end)}
    nodes["show"] = node("PreviewAny", source=["on", 0])
    shown = []
    comfy.run(nodes, shown=shown)
    lines = [text for text in shown if isinstance(text, str) and text.startswith("on: ")]
    assert bool(lines) == bool(told)
    assert all(f"acts in no step: {told} holds none." in line for line in lines)


def test_positive_only_is_a_hook_on_the_positive_prompt(comfy, person, whole):
    nodes = {**person, "ours": apply(positive_only=True), "hook": hook()}
    nodes["hooked"] = node(
        "ConditioningSetProperties", cond_NEW=["words", 0], strength=1.0, set_cond_area="default",
        hooks=["hook", 0],
    )  # fmt: skip
    nodes |= picture("positive", ["ours", 0]) | picture("cores", MODEL, ("hooked", 0))
    shown = comfy.run(nodes).pictures
    assert difference(shown["positive"], shown["cores"]) <= ROUNDING
    assert difference(shown["positive"], whole["by_us"]) > 8


def test_two_on_one_model_add_up(comfy, person, whole):
    timed = {"end_percent": 0.999}  # until after the last step
    nodes = {**person, "one": apply(strength=0.3, **timed)}
    nodes |= {"two": apply(["one", 0], strength=0.5, **timed)}
    nodes |= {"undone": apply(["two", 0], strength=-0.8, **timed)}
    nodes |= picture("both", ["two", 0]) | picture("none_left", ["undone", 0])
    shown = comfy.run(nodes).pictures
    assert difference(shown["both"], whole["by_core"]) <= ROUNDING
    assert difference(shown["none_left"], whole["before"]) <= ROUNDING


def test_scaled_lora_comes_out_to_be_kept(comfy, comfy_server, person):
    nodes = {**person, "part": apply(strength=0.5, cross_attention=0.0, middle_block=3.0)}
    nodes |= {"hook": hook(("part", 1)), "hooked": on_both(("hook", 0))}
    nodes |= picture("model", ["part", 0]) | picture("again", MODEL, ("hooked", 0), ("hooked", 1))
    for name, source in (("whole", ["lora", 0]), ("scaled", ["part", 1])):
        nodes[name] = node("SaveLoRA", lora=source, prefix=f"loras/{name}", steps=0)
    shown = comfy.run(nodes).pictures
    assert difference(shown["model"], shown["again"]) <= ROUNDING
    files = [
        load_file(max(comfy_server.output_directory.glob(f"loras/{name}*")))
        for name in ("whole", "scaled")
    ]
    assert set(files[0]) == set(files[1])
    for key, value in files[0].items():
        factor = 0.0 if "attn2" in key else 1.5 if "middle_block" in key else 0.5
        wanted = value * factor if key.endswith(".alpha") else value
        torch.testing.assert_close(files[1][key], wanted)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_the_model_counts(comfy, person, whole, part):
    others = {name: 0.0 for name in PARTS if name != part}
    nodes = {**person, "part": apply(**others)} | picture("out", ["part", 0])
    assert difference(comfy.run(nodes).pictures["out"], whole["before"]) > 2


def test_loras_of_other_packs_are_taken(comfy, person, whole):
    nodes = {**person, "same": node("TestHyperLoRA", lora=["lora", 0], kind="same")}
    nodes |= {"peft": node("TestHyperLoRA", lora=["lora", 0], kind="peft")}
    nodes |= {"a": apply(lora=("same", 0), strength=0.8), "b": apply(lora=("peft", 0))}
    nodes |= {"c": hook(("peft", 0), base_model=MODEL), "hooked": on_both(("c", 0))}
    nodes |= picture("hyper", ["a", 0]) | picture("named", ["b", 0])
    nodes |= picture("hooks", MODEL, ("hooked", 0), ("hooked", 1))
    shown = comfy.run(nodes).pictures
    assert difference(shown["hyper"], whole["by_core"]) == 0
    assert difference(shown["named"], shown["hooks"]) <= ROUNDING


BAD = {
    "empty": "LoRA is empty",
    "another base": "do not fit the base model",
    "half of another base": "do not fit the base model",
    "text": "A str is not a LoRA",
    "text encoder": "edits text encoders only",
    "more layers": "for no layer of the base model",
}


@pytest.mark.parametrize("kind", BAD)
def test_loras_that_cannot_be_used(comfy, person, kind):
    nodes = {**person, "bad": node("TestHyperLoRA", lora=["lora", 0], kind=kind)}
    users = {
        "applied": (apply(lora=("bad", 0)), picture("out", ["applied", 0])),
        "hook": (hook(("bad", 0), base_model=MODEL), {"hooked": on_both(("hook", 0))}),
    }
    for name, (user, rest) in users.items():
        tail = picture("out", MODEL, ("hooked", 0)) if name == "hook" else {}
        with pytest.raises(ComfyPromptError, match=BAD[kind]) as caught:
            comfy.run({**nodes, name: user, **rest, **tail})
        assert caught.value.node_id == name


@pytest.mark.parametrize("kind", ["another base", "half of another base", "text encoder"])
def test_hooks_are_checked_when_sampling_starts(comfy, person, kind):
    """Without base_model the hook learns of the model from the sampler alone."""
    nodes = {**person, "bad": node("TestHyperLoRA", lora=["lora", 0], kind=kind)}
    nodes |= {"hook": hook(("bad", 0)), "hooked": on_both(("hook", 0))}
    with pytest.raises(ComfyPromptError, match="LoRA of a hook does not fit the base model"):
        comfy.run({**nodes, **picture("out", MODEL, ("hooked", 0), ("hooked", 1))})


def test_start_after_the_end(comfy, person):
    nodes = {**person, "timed": apply(start_percent=0.6, end_percent=0.4)}
    with pytest.raises(ComfyPromptError, match="would never act") as caught:
        comfy.run({**nodes, **picture("out", ["timed", 0])})
    assert caught.value.node_id == "timed"


def test_what_a_hook_leaves_out_is_logged(node_module, demo_world, caplog):
    import comfy.hooks

    model = node_module("host.demo").load_demo_unet(demo_world / "base.safetensors")
    shape = next(iter(demo_layout(1)))
    layer = LoRALayer(torch.zeros(1, shape.in_features), torch.zeros(shape.out_features, 1), 1.0)
    weights = LoRAWeights({shape.name: layer, "input_blocks.90.1.to_q": layer})
    state = to_state_dict(weights) | {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(2, 1)
    }
    group = node_module("host.lora").lora_hook(state, 1.0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    (hook,) = group.hooks
    assert hook.clone().weights is hook.weights
    hook.add_hook_patches(model, {}, target, comfy.hooks.HookGroup())
    lines = [r.getMessage() for r in caplog.records if "not loaded" in r.getMessage()]
    assert len(lines) == 3  # up, down and alpha
    assert all("input_blocks_90_1_to_q" in line for line in lines)


def test_convolutions_act_in_parts_and_times(comfy, person, whole):
    """Core's keyframes and our late start; its block's factor reaches a convolution too."""
    nodes = {**person, "mixed": node("TestHyperLoRA", lora=["lora", 0], kind="convolution")}
    nodes |= {"core": node("LoraModelLoader", model=MODEL, lora=["mixed", 1], strength_model=1.0,
                           bypass=False)}  # fmt: skip
    nodes |= {
        "ours": apply(lora=("mixed", 0)),
        "timed": apply(lora=("mixed", 0), start_percent=0.5),
    }
    nodes |= {"hook": hook(("mixed", 0)), "off": apply(lora=("mixed", 0), input_blocks=0.0)}
    nodes |= {"same": apply(input_blocks=0.0)}
    nodes |= keyframes(k0=(0.0, 0.0), k1=(0.5, 1.0)) | {"hooked": on_both(("scheduled", 0))}
    for name in ("core", "ours", "timed", "off", "same"):
        nodes |= picture(f"{name}_p", [name, 0])
    nodes |= picture("cores", MODEL, ("hooked", 0), ("hooked", 1))
    shown = comfy.run(nodes).pictures
    assert difference(shown["ours_p"], shown["core_p"]) == 0
    assert difference(shown["ours_p"], whole["by_us"]) > 8
    assert difference(shown["timed_p"], shown["cores"]) <= ROUNDING
    assert difference(shown["off_p"], shown["same_p"]) == 0


def test_text_encoder_layers_stay_in_the_lora(comfy, comfy_server, person):
    nodes = {**person, "mixed": node("TestHyperLoRA", lora=["lora", 0], kind="with text")}
    nodes |= {"half": apply(lora=("mixed", 0), strength=0.5, cross_attention=0.0)}
    for name, source in (("all", ["mixed", 1]), ("kept", ["half", 1])):
        nodes[name] = node("SaveLoRA", lora=source, prefix=f"loras/{name}", steps=0)
    comfy.run({**nodes, **picture("out", ["half", 0])})
    files = [
        load_file(max(comfy_server.output_directory.glob(f"loras/{name}*")))
        for name in ("all", "kept")
    ]
    text = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    assert set(files[1]) == set(files[0]) | {f"{text}.alpha"}
    assert float(files[1][f"{text}.alpha"]) == 0.5 * 2  # its rank is 2


def test_peft_names_reach_a_hook_without_base_model(comfy, person, whole):
    nodes = {**person, "peft": node("TestHyperLoRA", lora=["lora", 0], kind="peft")}
    nodes |= {"a": hook(("peft", 0), 9.0), "b": hook(("peft", 0), 9.0, base_model=MODEL)}
    for name in "ab":
        nodes[f"{name}_on"] = on_both((name, 0))
        nodes |= picture(f"{name}_p", MODEL, (f"{name}_on", 0), (f"{name}_on", 1))
    shown = comfy.run(nodes).pictures
    assert difference(shown["a_p"], shown["b_p"]) == 0
    assert difference(shown["a_p"], whole["before"]) > 2
