"""The workflows of people and pictures: each function draws one graph for one target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .builder import Graph, Out
from .notes import NOTES
from .targets import Target, WorkflowBuilder

PERSON, SECOND = "difflora_demo_person.png", "difflora_demo_second_person.png"
MORE_PHOTOS = ("difflora_demo_person_2.png", "difflora_demo_person_3.png")
SCENE = "difflora_demo_scene.png"

Draw = Callable[[Graph, Target], None]

SMILING = (
    "photo of a person, smiling, blue background, red shirt",
    "portrait photo of a person smiling, red shirt, blue studio background, soft light",
)


def quickstart(graph: Graph, target: Target) -> None:
    """Photo, Personalize, apply."""
    builder = WorkflowBuilder(graph, target, NOTES["quickstart"])
    add = graph.add
    with graph.group("1 Load"):
        photo = builder.photo(PERSON, "Photo of the person")
        builder.load()
    with graph.group("2 Personalize"):
        lora = builder.personalize(photo)["LORA_MODEL"]
        add("SaveLoRA", 0, title="Keep the LoRA", lora=lora, prefix="loras/difflora", steps=0)
    with graph.group("3 Apply and draw"):
        model = builder.apply_lora(lora)
        prompts = builder.prompts(0, *SMILING)
        canvas = builder.canvas(0, batch=4)
        pictures = builder.draw(1, "With the LoRA", model, prompts, canvas, 7)
        builder.save(2, pictures, "personalized", "The person")
    with graph.group("The untouched base beside it"):
        plain = builder.draw(0, "Without it, same seed", builder.model, prompts, canvas, 7)
        builder.save(1, plain, "base", "The base model alone")


def portrait(graph: Graph, target: Target) -> None:
    """The long path, with every setting."""
    builder = WorkflowBuilder(graph, target, NOTES["portrait"])
    add = graph.add
    with graph.group("1 Load"):
        photo = builder.photo(PERSON, "Photo of the person")
        builder.load()
    with graph.group("2 The person"):
        latent = builder.latent(photo, "the person")
        lora = builder.decode(latent["DIFFLORA_LATENT"])["LORA_MODEL"]
    with graph.group("3 Apply and draw"):
        apply = add("DiffLoRA_ApplyLoRA", 0, model=builder.model, lora=lora)
        prompts = builder.prompts(
            0,
            "photo of a person, neutral, grey background, purple shirt",
            "portrait photo of a person, calm expression, purple shirt, grey background, 85mm",
        )
        pictures = builder.draw(1, "Draw", apply["MODEL"], prompts, builder.canvas(1, batch=2))
        builder.save(2, pictures, "portrait")
    with graph.group("4 How alike?", wide=True):
        add(
            "DiffLoRA_CompareIdentities",
            0,
            references=photo,
            pictures=pictures,
            face_analysis=builder.faces,
        )


def several_photos(graph: Graph, target: Target) -> None:
    """Three photos of one person against one."""
    builder = WorkflowBuilder(graph, target, NOTES["several_photos"])
    with graph.group("1 Load"):
        first = builder.photo(PERSON, "Photo 1")
        others = [builder.photo(name, f"Photo {k + 2}") for k, name in enumerate(MORE_PHOTOS)]
        photos = builder.batch(1, [first, *others], "All photos")
        builder.load(1)
    with graph.group("2 Personalize"):
        loras = [
            builder.personalize(pictures, 0, title)["LORA_MODEL"]
            for pictures, title in ((first, "From one photo"), (photos, "From all photos"))
        ]
    with graph.group("3 Draw both"):
        prompts = builder.prompts(
            0,
            "photo of a person, sad, green background, orange shirt",
            "photo of a person in an orange shirt, sad look, green wall behind",
        )
        canvas = builder.canvas(0, batch=2)
        drawn = []
        for lora, title in zip(loras, ("one photo", "all photos"), strict=True):
            model = builder.apply_lora(lora, 1)
            drawn.append(builder.draw(1, f"From {title}", model, prompts, canvas))
    with graph.group("4 Compare", wide=True):
        labels = ("one photo", "one photo", "all photos", "all photos")
        grid = builder.grid(0, builder.batch(0, drawn), labels, 4, reference=first)
        save_grid(builder, grid, "several_photos")


def two_people(graph: Graph, target: Target) -> None:
    """Two people side by side, each in a mask of their own."""
    builder = WorkflowBuilder(graph, target, NOTES["two_people"])
    with graph.group("1 Load"):
        photos = [builder.photo(PERSON, "Left person"), builder.photo(SECOND, "Right person")]
        builder.load(1)
    with graph.group("2 Two LoRAs"):
        names = ("left", "right")
        loras = [
            builder.personalize(photo, 0, f"LoRA of the {name} person")["LORA_MODEL"]
            for photo, name in zip(photos, names, strict=True)
        ]
    with graph.group("3 Who stands where"):
        side = target.pick(64, 832)
        masks = _halves(builder, side)
        prompts = builder.prompts(
            0,
            "photo of two people, blue background, white shirt, green shirt",
            "photo of two people side by side, blue background, white shirt, green shirt",
        )
        placed = _in_masks(builder, loras, masks, prompts)
    with graph.group("4 Draw"):
        canvas = builder.canvas(0, wide=2)
        picture = builder.draw(0, "Each in a mask", builder.model, placed, canvas)
        builder.save(1, picture, "two_people", "Two people")
    with graph.group("Without masks, same seed"):
        model = builder.apply_lora(loras[0], 0, 0.7, "Left person on the whole picture")
        add = graph.add
        both = add(
            "LoraModelLoader",
            0,
            title="And the right one",
            model=model,
            lora=loras[1],
            strength_model=0.7,
            bypass=False,
        )["MODEL"]
        mixed = builder.draw(0, "Both everywhere", both, prompts, canvas)
        builder.save(1, mixed, "two_people_without_masks", "The faces mix")


def people_by_words(graph: Graph, target: Target) -> None:
    """Two people side by side, each where the picture shows their words."""
    builder = WorkflowBuilder(graph, target, NOTES["people_by_words"])
    with graph.group("1 Load"):
        photos = [builder.photo(PERSON, "One person"), builder.photo(SECOND, "The other person")]
        builder.load(1)
    with graph.group("2 Two LoRAs"):
        loras = [
            builder.personalize(photo, 0, f"LoRA of {name}")["LORA_MODEL"]
            for photo, name in zip(photos, ("one person", "the other"), strict=True)
        ]
    with graph.group("3 Whose words?"):
        model, clip = builder.model, builder.clip
        words = target.pick(
            ("white shirt", "green shirt"), ("person in a white shirt", "person in a green shirt")
        )
        for lora, own, name in zip(loras, words, ("One person", "The other"), strict=True):
            placed = graph.add(
                "DiffLoRA_PlaceLoRA",
                0,
                title=f"{name}, by words",
                model=model,
                clip=clip,
                lora=lora,
                words=own,
            )
            model, clip = placed["MODEL"], placed["CLIP"]
        builder.clip = clip
        prompts = builder.prompts(
            1,
            "photo of two people, blue background, white shirt, green shirt",
            "photo of two people side by side, person in a white shirt on the left, person in a "
            "green shirt on the right, blue background",
        )
    with graph.group("4 Draw"):
        canvas = builder.canvas(0, batch=2, wide=2)
        picture = builder.draw(0, "Each by their words", model, prompts, canvas)
        builder.save(1, picture, "people_by_words", "Two people")


def edit_face(graph: Graph, target: Target) -> None:
    """Image to image, and a new face in an old picture."""
    builder = WorkflowBuilder(graph, target, NOTES["inpaint_face"])
    add = graph.add
    with graph.group("1 Load"):
        person = builder.photo(PERSON, "Photo of the person")
        old = builder.photo(SCENE, "Picture to change")
        builder.load(1)
    with graph.group("2 Person and prompt"):
        lora = builder.personalize(person)["LORA_MODEL"]
        model = builder.apply_lora(lora, 1)
        prompts = builder.prompts(
            1,
            "photo of a person, smiling, striped pink background, yellow shirt, holding a red "
            "flower",
            "photo of a person smiling, holding a red flower, pink background",
        )
    with graph.group("3 Only the face"):
        found = add(
            "DiffLoRA_ExtractFeatures",
            0,
            title="Find the face",
            images=old,
            clip_vision=builder.clip_vision,
            face_analysis=builder.faces,
        )
        grow = target.pick(9, 64)
        mask = add("GrowMask", 1, mask=found["MASK"], expand=grow, tapered_corners=True)
        encoded = add("VAEEncode", 1, pixels=old, vae=builder.vae)["LATENT"]
        masked = add("SetLatentNoiseMask", 1, samples=encoded, mask=mask["MASK"])["LATENT"]
        new = builder.draw(2, "Draw the face", model, prompts, masked, denoise=0.9)
        builder.save(3, new, "new_face", "New face, old picture")
    with graph.group("4 The whole picture"):
        again = builder.draw(0, "Draw it all again", model, prompts, encoded, denoise=0.7)
        builder.save(1, again, "image_to_image", "Image to image")


def _halves(builder: WorkflowBuilder, side: int) -> list[Out]:
    """Masks of the left and the right half of a picture twice as wide as high."""
    add = builder.graph.add
    black = add("SolidMask", 1, title="Black", value=0.0, width=2 * side, height=side)["MASK"]
    white = add("SolidMask", 1, title="White half", value=1.0, width=side, height=side)["MASK"]
    return [
        add(
            "MaskComposite",
            1,
            title=f"{name} half",
            destination=black,
            source=white,
            x=x,
            y=0,
            operation="add",
        )["MASK"]
        for name, x in (("Left", 0), ("Right", side))
    ]


def _in_masks(
    builder: WorkflowBuilder, loras: list[Out], masks: list[Out], prompts: tuple[Out, Out]
) -> tuple[Out, Out]:
    """Prompts under which each LoRA acts in its own mask."""
    add = builder.graph.add
    hooks = [
        add("DiffLoRA_LoRAToHook", 2, lora=lora, base_model=builder.model)["HOOKS"]
        for lora in loras
    ]
    new: dict[str, Any] = {
        "positive_NEW": prompts[0],
        "negative_NEW": prompts[1],
        "set_cond_area": "default",
    }
    left = add(
        "PairConditioningSetProperties",
        2,
        title="Left person, left half",
        mask=masks[0],
        hooks=hooks[0],
        **new,
    )
    both = add(
        "PairConditioningSetPropertiesAndCombine",
        2,
        title="Right person, right half",
        positive=left["positive"],
        negative=left["negative"],
        mask=masks[1],
        hooks=hooks[1],
        **new,
    )
    return both["positive"], both["negative"]


def save_grid(builder: WorkflowBuilder, grid: Out, name: str) -> None:
    """Keep a comparison grid."""
    prefix = f"DiffLoRA/{name}"
    builder.graph.add(
        "SaveImage", 0, title="Keep the grid", folded=True, images=grid, filename_prefix=prefix
    )
