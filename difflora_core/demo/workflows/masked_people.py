"""Several people in one picture, each in a mask of their own or by words: graphs in API form.

Core's nodes and ours only. Every person's LoRA becomes a hook on the same prompt, which names them
all; the masks say where each hook counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...config import Config, check_range
from ...diffusion.sampler import MAX_SEED
from ...errors import ConfigError
from ..world.scenes import PICTURE_SIZE

AREAS = ("default", "mask bounds")
FIND = 0.15
"""The share of the steps in which people are found by their words; of the node, too."""
PICTURE = "picture"
"""Id of the node that saves the picture."""

_MODEL, _CLIP, _VAE, _VISION, _FACES, _DIFFLORA = (["demo", output] for output in range(6))
PERSONALIZE: dict[str, Any] = {
    "difflora_model": _DIFFLORA,
    "clip_vision": _VISION,
    "face_analysis": _FACES,
    "mode": "best_guess",
    "seed": 0,
    "steps": 1,
    "guidance": 1.0,
    "on_missing_face": "error",
    "face_order": "largest",
    "face_index": 0,
    "image_region": "crop",
    "gate": "learned",
    "face_share": 0.5,
}
"""Inputs of Personalize beside the photo, in a graph whose node `demo` loads the demo world."""


@dataclass(frozen=True)
class MaskedScene(Config):
    """What to draw, and how.

    `text`: the prompt; `seed`, `steps`, `guidance`: of the sampler; `masks`: False gives every
    person the whole picture, for comparison; `area`: "default" draws the whole picture for every
    person and keeps what lies in the mask, "mask bounds" draws each mask as a picture of its own,
    for more people than the base model knows to draw; `strength`: of each LoRA. Without masks:
    `words` of the text that name each person, and the share of the steps to `find` them in.

    Raises:
        ConfigError: a value out of range.
    """

    text: str = "photo of two people, blue background, red shirt, green shirt"
    seed: int = 0
    steps: int = 12
    guidance: float = 1.5
    masks: bool = True
    area: str = "default"
    strength: float = 1.0
    words: tuple[str, ...] = ("red shirt", "green shirt")
    find: float = FIND

    def __post_init__(self) -> None:
        where = "Masked scene"
        check_range(where, "seed", self.seed, 0, MAX_SEED)
        check_range(where, "steps", self.steps, 1, 10_000)
        check_range(where, "guidance", self.guidance, 0, 100)
        check_range(where, "strength", self.strength, -100, 100)
        check_range(where, "find", self.find, 0, 0.9)
        if self.area not in AREAS:
            raise ConfigError(f"{where}: area is {self.area!r}; use one of {', '.join(AREAS)}.")


def masked_people(photos: Sequence[str], scene: MaskedScene) -> dict[str, dict[str, Any]]:
    """The prompt for people side by side, in columns of equal width from left to right.

    Args:
        photos: one name of a picture in ComfyUI's input folder for each person.
        scene: what to draw.

    Returns:
        Node id to {class_type, inputs}; the node `PICTURE` saves the picture.
    """
    width, side = len(photos) * PICTURE_SIZE, PICTURE_SIZE
    prompt = {
        "demo": _node("DiffLoRA_LoadDemo"),
        "words": _node("CLIPTextEncode", clip=_CLIP, text=scene.text),
        "nothing": _node("CLIPTextEncode", clip=_CLIP, text=""),
        "outside": _node("SolidMask", value=0.0, width=width, height=side),
        "column": _node("SolidMask", value=1.0, width=side, height=side),
    }
    for number, photo in enumerate(photos):
        prompt |= _person(number, photo, scene)
    last = f"placed{len(photos) - 1}"
    return prompt | _drawn(scene, width, _MODEL, [last, 0], [last, 1])


def people_by_words(photos: Sequence[str], scene: MaskedScene) -> dict[str, dict[str, Any]]:
    """The prompt for people without masks, each where the picture shows their words.

    Args:
        photos: one name of a picture in ComfyUI's input folder for each person.
        scene: what to draw, `words` for each person among it.

    Returns:
        Node id to {class_type, inputs}; the node `PICTURE` saves the picture.
    """
    prompt = {"demo": _node("DiffLoRA_LoadDemo")}
    model, clip = _MODEL, _CLIP
    for number, (photo, words) in enumerate(zip(photos, scene.words, strict=True)):
        prompt |= _lora(number, photo)
        prompt[f"placed{number}"] = _node(
            "DiffLoRA_PlaceLoRA",
            model=model,
            clip=clip,
            lora=[f"lora{number}", 0],
            words=words,
            strength=scene.strength,
            find_percent=scene.find,
        )
        model, clip = [f"placed{number}", 0], [f"placed{number}", 1]
    prompt["words"] = _node("CLIPTextEncode", clip=clip, text=scene.text)
    prompt["nothing"] = _node("CLIPTextEncode", clip=clip, text="")
    width = len(photos) * PICTURE_SIZE
    return prompt | _drawn(scene, width, model, ["words", 0], ["nothing", 0])


def _drawn(
    scene: MaskedScene, width: int, model: list[Any], positive: list[Any], negative: list[Any]
) -> dict[str, dict[str, Any]]:
    """Sampling, and the node `PICTURE`."""
    sampler = _node(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=["empty", 0],
        seed=scene.seed,
        steps=scene.steps,
        cfg=scene.guidance,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    return {
        "empty": _node("EmptyLatentImage", width=width, height=PICTURE_SIZE, batch_size=1),
        "sampler": sampler,
        "pixels": _node("VAEDecode", samples=["sampler", 0], vae=_VAE),
        PICTURE: _node("SaveImage", images=["pixels", 0], filename_prefix="people"),
    }


def _lora(number: int, photo: str) -> dict[str, dict[str, Any]]:
    """A photo and its LoRA."""
    return {
        f"photo{number}": _node("LoadImage", image=photo),
        f"lora{number}": _node("DiffLoRA_Personalize", images=[f"photo{number}", 0], **PERSONALIZE),
    }


def _person(number: int, photo: str, scene: MaskedScene) -> dict[str, dict[str, Any]]:
    """One person: photo, LoRA, hook, and the prompt in that person's column."""
    place: dict[str, Any] = {
        "positive_NEW": ["words", 0],
        "negative_NEW": ["nothing", 0],
        "strength": 1.0,
        "set_cond_area": scene.area,
        "hooks": [f"hook{number}", 0],
    }
    kind = "PairConditioningSetProperties"
    if scene.masks:
        place["mask"] = [f"mask{number}", 0]
    if number:
        before = f"placed{number - 1}"
        place |= {"positive": [before, 0], "negative": [before, 1]}
        kind += "AndCombine"
    return _lora(number, photo) | {
        f"hook{number}": _node(
            "DiffLoRA_LoRAToHook",
            lora=[f"lora{number}", 0],
            strength_model=scene.strength,
            base_model=_MODEL,
        ),
        f"mask{number}": _node(
            "MaskComposite",
            destination=["outside", 0],
            source=["column", 0],
            x=number * PICTURE_SIZE,
            y=0,
            operation="add",
        ),
        f"placed{number}": _node(kind, **place),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
