"""The workflows of keeping identities: a library of people, and old LoRAs made small."""

from __future__ import annotations

from .builder import Graph
from .notes import NOTES
from .people import PERSON, SECOND, save_grid
from .targets import Target, WorkflowBuilder

OLD_LORA = "difflora_demo_old_lora.safetensors"


def library(graph: Graph, target: Target) -> None:
    """Keep two people in one file, take one out."""
    builder = WorkflowBuilder(graph, target, NOTES["library"])
    add = graph.add
    people = (("Ada", PERSON), ("Bea", SECOND))
    with graph.group("1 Load"):
        photos = [builder.photo(picture, f"Photo of {name}") for name, picture in people]
        builder.load()
    with graph.group("2 Add two people"):
        shelf = None
        for (name, _), photo in zip(people, photos, strict=True):
            latent = builder.latent(photo, name, folded=True)
            kept = add(
                "DiffLoRA_AddToLibrary",
                0,
                title=f"Keep {name}",
                difflora_model=builder.difflora,
                identity=latent["DIFFLORA_LATENT"],
                library=shelf or target.pick("difflora_demo", "people"),
                name=name,
                same_name="replace",
                thumbnail=photo,
            )
            shelf = kept["library"]
    with graph.group("3 Who is there?"):
        add("DiffLoRA_ListLibrary", 0, library=shelf)
    with graph.group("4 Use one of them"):
        picked = add("DiffLoRA_PickFromLibrary", 0, library=shelf, name="Bea")
        lora = builder.decode(picked["DIFFLORA_LATENT"])["LORA_MODEL"]
        model = builder.apply_lora(lora)
        prompts = builder.prompts(
            1,
            "photo of a person, smiling, green background, red shirt",
            "photo of a person smiling in a garden, red shirt",
        )
        pictures = builder.draw(1, "Draw", model, prompts, builder.canvas(1, batch=2))
        builder.save(2, pictures, "from_the_library")


def compress_lora(graph: Graph, target: Target) -> None:
    """An existing LoRA as a few hundred numbers."""
    builder = WorkflowBuilder(graph, target, NOTES["compress_lora"])
    add = graph.add
    with graph.group("1 Load"):
        old = add(
            "DiffLoRA_LoadLoRAFile",
            0,
            title="The old LoRA",
            lora_name=target.pick(OLD_LORA, "my_person.safetensors"),
        )["LORA_MODEL"]
        builder.load()
    with graph.group("2 Encode and decode"):
        encoded = add(
            "DiffLoRA_EncodeLoRA", 0, difflora_model=builder.difflora, lora=old, refine_steps=40
        )
        new = builder.decode(encoded["DIFFLORA_LATENT"], 0, "The LoRA that came back")["LORA_MODEL"]
        add("SaveLoRA", 0, title="Keep it", lora=new, prefix="loras/compressed", steps=0)
    with graph.group("3 Draw three ways"):
        prompts = builder.prompts(
            0,
            "photo of a person, smiling, blue background, white shirt",
            "photo of a person smiling, white shirt, blue background",
        )
        canvas = builder.canvas(0)
        models = [
            builder.model,
            builder.apply_lora(old, 0, 1.0, "With the old LoRA"),
            builder.apply_lora(new, 0, 1.0, "With the one that came back"),
        ]
        titles = ("Without", "Old LoRA", "What came back")
        drawn = [
            builder.draw(1, title, model, prompts, canvas, 7)
            for title, model in zip(titles, models, strict=True)
        ]
    with graph.group("4 Compare", wide=True):
        labels = ("without", "old LoRA", "came back")
        save_grid(builder, builder.grid(0, builder.batch(0, drawn), labels, 3), "compressed_lora")
