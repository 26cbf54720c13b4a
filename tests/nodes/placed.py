"""Everything that we put on a model, beside the way in which core does the same, if it has one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from tests.nodes.sampler_graphs import (
    CLIP,
    MODEL,
    apply_lora,
    hooked,
    invented_lora,
    node,
    sampling_nodes,
    shown,
)

SMILING = "photo of a person, smiling"
HAT = "photo of a person, smiling, wearing a <demo-hat>"


@dataclass(frozen=True)
class Placed:
    """A model and prompts, by their nodes."""

    model: tuple[str, int] = ("demo", 0)
    positive: tuple[str, int] = ("words", 0)
    negative: tuple[str, int] = ("none", 0)


@dataclass(frozen=True)
class Ours:
    """Nodes of ours, what is sampled with, the same without, and by core's own nodes if it can."""

    nodes: dict
    ours: Placed
    base: Placed = field(default_factory=Placed)
    cores: Placed | None = None


def ksampler(name, placed, **changes):
    """Nodes that draw with KSampler."""
    latent = node(
        "KSampler", model=list(placed.model), positive=list(placed.positive),
        negative=list(placed.negative), latent_image=["empty", 0], seed=3, steps=3, cfg=2.0,
        sampler_name="euler", scheduler="normal", denoise=1.0,
    )  # fmt: skip
    latent["inputs"] |= changes
    return {f"{name}_latent": latent, **shown(name, [f"{name}_latent", 0])}


def masks():
    """Two halves of a picture."""
    black = node("SolidMask", value=0.0, width=64, height=64)
    white = node("SolidMask", value=1.0, width=32, height=64)
    return {
        "black": black,
        "white": white,
        **{
            f"half{k}": node(
                "MaskComposite", destination=["black", 0], source=["white", 0], x=32 * k, y=0,
                operation="add",
            )
            for k in range(2)
        },
    }  # fmt: skip


def two_people(name, hooks):
    """A prompt of two people, each by a hook in a half of the picture; `name` is the prompt."""
    halves = {
        f"{name}{k}": hooked(["words", 0], [hook, 0], mask=[f"half{k}", 0])
        for k, hook in enumerate(hooks)
    }
    both = node(
        "ConditioningCombine", conditioning_1=[f"{name}0", 0], conditioning_2=[f"{name}1", 0]
    )
    return {**halves, name: both}


def placed(model, clip, lora, words, strength=1.0):
    """A person by the words of a prompt."""
    return node(
        "DiffLoRA_PlaceLoRA", model=model, clip=clip, lora=[lora, 0], words=words,
        strength=strength, find_percent=0.15,
    )  # fmt: skip


def ours_to_hook(lora="lora"):
    return node("DiffLoRA_LoRAToHook", lora=[lora, 0], strength_model=1.0)


def timed():
    """The first half of the steps: core's keyframes on both prompts."""
    frames = {
        "k0": node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0),
        "k1": node(
            "CreateHookKeyframe", strength_mult=0.0, start_percent=0.4, prev_hook_kf=["k0", 0]
        ),
        "frames": node("SetHookKeyframes", hooks=["core hook", 0], hook_kf=["k1", 0]),
        "early": hooked(["words", 0], ["frames", 0]),
        "early none": hooked(["none", 0], ["frames", 0]),
        "on": apply_lora(end_percent=0.4),
    }
    return Ours(frames, Placed(("on", 0)), cores=Placed(MODEL, ("early", 0), ("early none", 0)))


def positive_only():
    nodes = {"on": apply_lora(positive_only=True), "core's": hooked(["words", 0], ["core hook", 0])}
    return Ours(nodes, Placed(("on", 0)), cores=Placed(positive=("core's", 0)))


def hook():
    nodes = {"hook": ours_to_hook(), "our words": hooked(["words", 0], ["hook", 0])}
    nodes["core's"] = hooked(["words", 0], ["core hook", 0])
    return Ours(nodes, Placed(positive=("our words", 0)), cores=Placed(positive=("core's", 0)))


def by_mask():
    nodes = masks() | {"hook": ours_to_hook(), "hook4": ours_to_hook("lora4")}
    nodes |= two_people("our words", ("hook", "hook4"))
    nodes |= two_people("core's", ("core hook", "core hook4"))
    return Ours(nodes, Placed(positive=("our words", 0)), cores=Placed(positive=("core's", 0)))


def by_words():
    """Two people in regions that the first step finds; what the words are hardly matters."""
    nodes = {"place0": placed(MODEL, CLIP, "lora", "person")}
    nodes["place1"] = placed(["place0", 0], ["place0", 1], "lora4", "smiling")
    nodes["placed words"] = node("CLIPTextEncode", clip=["place1", 1], text=SMILING)
    return Ours(nodes, Placed(("place1", 0), ("placed words", 0)))


def concept():
    settings = {
        "bias": 0.3, "temperature": 0.15, "strength": 1.0, "lock": "local", "start_percent": 0.0,
        "end_percent": 1.0, "combine": "approximate", "reach": -1,
    }  # fmt: skip
    nodes = {
        "hat": node("DiffLoRA_LoadConcept", concept_name="demo_hat.safetensors", clip=CLIP),
        "taught": node("CLIPTextEncode", clip=["hat", 1], text=HAT),
        "on": node("DiffLoRA_ApplyConcept", model=MODEL, concept=["hat", 0], **settings),
    }
    return Ours(nodes, Placed(("on", 0), ("taught", 0)), Placed(positive=("taught", 0)))


def style(name, **changes):
    parts = {
        "start_percent": 0.0, "end_percent": 1.0, "positive_only": True, "input_blocks": 1.0,
        "middle_block": 1.0, "output_blocks": 1.0, "self_attention": 1.0, "cross_attention": 1.0,
    }  # fmt: skip
    links = {"model": MODEL, "style": ["style", 0], "strength": 1.0}
    nodes = {
        "style": node("DiffLoRA_LoadStyle", style_name=f"demo_{name}.safetensors"),
        "on": node("DiffLoRA_ApplyStyle", **links, **(parts | changes)),
    }
    return Ours(nodes, Placed(("on", 0)))


def exported_style():
    """Directions taken away are a LoRA of the base: by core's hook, on the positive prompt."""
    given = style("sepia")
    nodes = given.nodes | {
        "lora of it": node("DiffLoRA_ExportStyleLoRA", model=MODEL, style=["style", 0]),
        "hook": ours_to_hook("lora of it"),
        "core's": hooked(["words", 0], ["hook", 0]),
    }
    return Ours(nodes, given.ours, cores=Placed(positive=("core's", 0)))


OURS: dict[str, Callable[[], Ours]] = {
    "LoRA, timed": timed,
    "LoRA, positive only": positive_only,
    "LoRA to Hook": hook,
    "two people by mask": by_mask,
    "two people by words": by_words,
    "concept": concept,
    "style of StyleInject": partial(style, "cyanotype"),
    "style of PaRa": exported_style,
}


def common_nodes(comfy, comfy_server):
    """Two people's LoRAs, also as hooks of core's own from files, and prompts."""
    people = invented_lora() | invented_lora(4)
    nodes = {"demo": node("DiffLoRA_LoadDemo"), **people}
    saved = {"placed": "lora", "placed4": "lora4"}
    comfy.run(
        nodes
        | {
            name: node("SaveLoRA", lora=[lora, 0], prefix=f"loras/{name}", steps=0)
            for name, lora in saved.items()
        }
    )
    for name, lora in saved.items():
        file = max(comfy_server.output_directory.glob(f"loras/{name}_*")).name
        hook = node("CreateHookLoraModelOnly", lora_name=file, strength_model=1.0)
        nodes[lora.replace("lora", "core hook")] = hook
    words = {"words": SMILING, "none": "cartoon"}
    encoded = {name: node("CLIPTextEncode", clip=CLIP, text=text) for name, text in words.items()}
    return nodes | encoded | sampling_nodes()
