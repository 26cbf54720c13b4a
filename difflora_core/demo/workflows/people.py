"""The workflows of people and pictures: each function draws one graph in one world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .builder import GRID_COLUMN, Graph, Out
from .notes import NOTES
from .worlds import Studio, World

PERSON, SECOND = "difflora_demo_person.png", "difflora_demo_second_person.png"
MORE_PHOTOS = ("difflora_demo_person_2.png", "difflora_demo_person_3.png")
SCENE = "difflora_demo_scene.png"

Draw = Callable[[Graph, World], None]

SMILING = (
    "photo of a person, smiling, blue background, red shirt",
    "portrait photo of a person smiling, red shirt, blue studio background, soft light",
)


def quickstart(graph: Graph, world: World) -> None:
    """Photo, Personalize, apply."""
    studio = Studio(graph, world, NOTES["quickstart"])
    add = graph.add
    with graph.group("1 Load"):
        photo = studio.photo(PERSON, "Photo of the person")
        studio.load()
    with graph.group("2 Personalize"):
        lora = studio.personalize(photo)["LORA_MODEL"]
        add("SaveLoRA", 0, title="Keep the LoRA", lora=lora, prefix="loras/difflora", steps=0)
    with graph.group("3 Apply and draw"):
        model = studio.dress(lora)
        prompts = studio.prompts(0, *SMILING)
        canvas = studio.canvas(0, batch=4)
        pictures = studio.draw(1, "With the LoRA", model, prompts, canvas, 7)
        studio.save(2, pictures, "personalized", "The person")
    with graph.group("The untouched base beside it", below=True):
        plain = studio.draw(0, "Without it, same seed", studio.model, prompts, canvas, 7)
        studio.save(1, plain, "base", "The base model alone")


def portrait(graph: Graph, world: World) -> None:
    """The long path, with every knob."""
    studio = Studio(graph, world, NOTES["portrait"])
    add = graph.add
    with graph.group("1 Load"):
        photo = studio.photo(PERSON, "Photo of the person")
        studio.load()
    with graph.group("2 The person"):
        latent = studio.latent(photo, "the person")
        lora = studio.decode(latent["DIFFLORA_LATENT"])["LORA_MODEL"]
    with graph.group("3 Apply and draw"):
        apply = add("DiffLoRA_ApplyLoRA", 0, model=studio.model, lora=lora)
        prompts = studio.prompts(
            0,
            "photo of a person, neutral, grey background, purple shirt",
            "portrait photo of a person, calm expression, purple shirt, grey background, 85mm",
        )
        pictures = studio.draw(1, "Draw", apply["MODEL"], prompts, studio.canvas(1, batch=2))
        studio.save(2, pictures, "portrait")
    with graph.group("4 How alike?", width=GRID_COLUMN):
        add(
            "DiffLoRA_CompareIdentities",
            0,
            references=photo,
            pictures=pictures,
            face_analysis=studio.faces,
        )


def several_photos(graph: Graph, world: World) -> None:
    """Three photos of one person against one."""
    studio = Studio(graph, world, NOTES["several_photos"])
    with graph.group("1 Load"):
        first = studio.photo(PERSON, "Photo 1")
        others = [studio.photo(name, f"Photo {k + 2}") for k, name in enumerate(MORE_PHOTOS)]
        photos = studio.batch(1, [first, *others], "All photos")
        studio.load(1)
    with graph.group("2 Personalize"):
        loras = [
            studio.personalize(pictures, 0, title)["LORA_MODEL"]
            for pictures, title in ((first, "From one photo"), (photos, "From all photos"))
        ]
    with graph.group("3 Draw both"):
        prompts = studio.prompts(
            0,
            "photo of a person, sad, green background, orange shirt",
            "photo of a person in an orange shirt, sad look, green wall behind",
        )
        canvas = studio.canvas(0, batch=2)
        drawn = []
        for lora, title in zip(loras, ("one photo", "all photos"), strict=True):
            model = studio.dress(lora, 1)
            drawn.append(studio.draw(1, f"From {title}", model, prompts, canvas))
    with graph.group("4 Compare", width=GRID_COLUMN):
        labels = ("one photo", "one photo", "all photos", "all photos")
        grid = studio.grid(0, studio.batch(0, drawn), labels, 4, reference=first)
        save_grid(studio, grid, "several_photos")


def two_people(graph: Graph, world: World) -> None:
    """Two people side by side, each in a mask of their own."""
    studio = Studio(graph, world, NOTES["two_people"])
    with graph.group("1 Load"):
        photos = [studio.photo(PERSON, "Left person"), studio.photo(SECOND, "Right person")]
        studio.load(1)
    with graph.group("2 Two LoRAs"):
        names = ("left", "right")
        loras = [
            studio.personalize(photo, 0, f"LoRA of the {name} person")["LORA_MODEL"]
            for photo, name in zip(photos, names, strict=True)
        ]
    with graph.group("3 Who stands where"):
        side = world.pick(64, 832)
        masks = _halves(studio, side)
        prompts = studio.prompts(
            0,
            "photo of two people, blue background, white shirt, green shirt",
            "photo of two people side by side, blue background, white shirt, green shirt",
        )
        placed = _in_masks(studio, loras, masks, prompts)
    with graph.group("4 Draw"):
        canvas = studio.canvas(0, wide=2)
        picture = studio.draw(0, "Each in a mask", studio.model, placed, canvas)
        studio.save(1, picture, "two_people", "Two people")
    with graph.group("Without masks, same seed", below=True):
        model = studio.dress(loras[0], 0, 0.7, "Left person on the whole picture")
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
        mixed = studio.draw(0, "Both everywhere", both, prompts, canvas)
        studio.save(1, mixed, "two_people_without_masks", "The faces mix")


def edit_face(graph: Graph, world: World) -> None:
    """Image to image, and a new face in an old picture."""
    studio = Studio(graph, world, NOTES["inpaint_face"])
    add = graph.add
    with graph.group("1 Load"):
        person = studio.photo(PERSON, "Photo of the person")
        old = studio.photo(SCENE, "Picture to change")
        studio.load(1)
    with graph.group("2 Person and prompt"):
        lora = studio.personalize(person)["LORA_MODEL"]
        model = studio.dress(lora, 1)
        prompts = studio.prompts(
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
            clip_vision=studio.clip_vision,
            face_analysis=studio.faces,
        )
        grow = world.pick(9, 64)
        mask = add("GrowMask", 1, mask=found["MASK"], expand=grow, tapered_corners=True)
        encoded = add("VAEEncode", 1, pixels=old, vae=studio.vae)["LATENT"]
        masked = add("SetLatentNoiseMask", 1, samples=encoded, mask=mask["MASK"])["LATENT"]
        new = studio.draw(2, "Draw the face", model, prompts, masked, denoise=0.9)
        studio.save(3, new, "new_face", "New face, old picture")
    with graph.group("4 The whole picture", below=True):
        again = studio.draw(0, "Draw it all again", model, prompts, encoded, denoise=0.7)
        studio.save(1, again, "image_to_image", "Image to image")


def _halves(studio: Studio, side: int) -> list[Out]:
    """Masks of the left and the right half of a picture twice as wide as high."""
    add = studio.graph.add
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
    studio: Studio, loras: list[Out], masks: list[Out], prompts: tuple[Out, Out]
) -> tuple[Out, Out]:
    """Prompts under which each LoRA acts in its own mask."""
    add = studio.graph.add
    hooks = [
        add("DiffLoRA_LoRAToHook", 2, lora=lora, base_model=studio.model)["HOOKS"] for lora in loras
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


def save_grid(studio: Studio, grid: Out, name: str) -> None:
    """Keep a comparison grid."""
    studio.graph.add("SaveImage", 0, images=grid, filename_prefix=f"DiffLoRA/{name}")
