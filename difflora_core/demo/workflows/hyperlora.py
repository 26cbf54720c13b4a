"""The workflow of HyperLoRA's public weights: a person on real SDXL. At full size alone."""

from __future__ import annotations

from .builder import Graph
from .people import PERSON
from .targets import Target, WorkflowBuilder

VARIANT = "sdxl_hyper_id_lora_v1_fidelity"
TRIGGER = "fcsks fxhks fhyks, "
"""The words with which the weights were trained; every prompt begins with them."""

NOTE = f"""
## A portrait with HyperLoRA's weights
A photo becomes a LoRA on real SDXL, in one pass: the public weights of HyperLoRA (arXiv \
2503.16944) stand where a DiffLoRA model would. **They are licensed CC-BY-NC 4.0: neither they nor \
what they make may be used commercially.** *Save LoRA with Details* writes that into the file.

- **Another person**: another picture in *Photo of the person*, or several in a batch.
- **Another scene**: change the prompt behind `{TRIGGER.strip()}`; keep these words at its start.
- **Strength**: about 0.8; lower follows the prompt more, higher the face.
- **Other workflows**: in `sdxl_blend`, `sdxl_two_people`, `sdxl_fade_in` and the like choose this \
model in *Load DiffLoRA Model*, set *image_region* of Extract Identity Features to `face_on_grey`, \
and put the words into the prompt. Sampled variants and invented people need a DiffLoRA model.
- **Base models**: RealVisXL 4 and other photographic SDXL checkpoints; a few do not take to it.
"""


def hyperlora_portrait(graph: Graph, target: Target) -> None:
    """Photo, Personalize with the public weights, apply."""
    builder = WorkflowBuilder(graph, target, NOTE)
    add = graph.add
    with graph.group("1 Load"):
        photo = builder.photo(PERSON, "Photo of the person")
        builder.load(model=f"hyper_lora/{VARIANT}")
    with graph.group("2 Personalize"):
        lora = builder.personalize(photo)["LORA_MODEL"]
        name, words = "hyperlora_person", TRIGGER.strip(", ")
        add(
            "DiffLoRA_SaveLoRA",
            0,
            title="Keep the LoRA",
            lora=lora,
            file_name=name,
            trigger_words=words,
            advised_strength=0.8,
            method="HyperLoRA",
        )
    with graph.group("3 Apply and draw"):
        model = builder.apply_lora(lora, strength=0.8)
        layer = add("CLIPSetLastLayer", 0, clip=builder.clip, stop_at_clip_layer=-2)
        builder.clip = layer["CLIP"]
        scene = "portrait photo of a person smiling, red shirt, blue studio background, soft light"
        prompts = builder.prompts(0, scene, TRIGGER + scene)
        canvas = builder.canvas(0, batch=2)
        pictures = builder.draw(1, "With the LoRA", model, prompts, canvas, 7)
        builder.save(2, pictures, "hyperlora_portrait", "The person")
    with graph.group("The untouched base beside it"):
        plain = builder.draw(0, "Without it, same seed", builder.model, prompts, canvas, 7)
        builder.save(1, plain, "base", "The base model alone")
