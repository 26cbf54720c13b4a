"""The workflows of taught words: train one, use one, use two, and let a person wear one."""

from __future__ import annotations

from typing import Any

from ..world.concept_examples import LESSON, LESSON_PHOTOS, SHIPPED, lesson_prompts, photo_name
from .builder import Graph, Out
from .concept_notes import CONCEPT_NOTES
from .people import PERSON, save_grid
from .worlds import Studio, World, concept_world

BIASES = (1.1, 0.95, 0.6)


def teach_concept(graph: Graph, world: World) -> None:
    """Three pictures and their masks become a word."""
    studio = Studio(graph, concept_world(world), CONCEPT_NOTES["teach_concept"], words=True)
    add = graph.add
    pictures, places = _lesson(studio)
    with graph.group("2 Load and train"):
        studio.load_base()
        covariance = add(
            "DiffLoRA_BuildCovariance",
            0,
            clip=studio.clip,
            captions=world.pick("demo", "general"),
            count=world.pick(2000, 20_000),
            file_name=world.pick("difflora_demo", "sdxl"),
        )
        word = LESSON.word
        trained = add(
            "DiffLoRA_TrainPerfusionConcept",
            1,
            model=studio.model,
            clip=studio.clip,
            vae=studio.vae,
            images=pictures,
            covariance=covariance["covariance"],
            masks=places,
            word=word,
            superclass="hat",
            prompts=world.pick("\n".join(lesson_prompts()), ""),
            steps=world.pick(100, 400),
            value_rate=world.pick(1.0, 0.03),
            word_rate=world.pick(0.001, 0.006),
            file_name=world.pick("difflora_demo_hat", "my_hat"),
            mirror=world.pick(False, True),
            reach=world.pick(0, -1),
            guidance=world.pick(1.5, 1.0),
        )
        add("PreviewAny", 1, title="What was kept", source=trained["report"])
    with graph.group("3 The word in a prompt"):
        apply = _worn(studio, studio.model, trained["concept"], 0)
        studio.clip = trained["CLIP"]
        prompts = studio.prompts(
            0,
            f"photo of a person, smiling, blue background, white shirt, wearing a {word}",
            f"photo of a woman wearing a {word}, city street, soft light",
        )
        drawn = studio.draw(1, "Draw", apply, prompts, studio.canvas(1, batch=4), 7)
        studio.save(2, drawn, "taught_word", "The taught hat")


def one_concept(graph: Graph, world: World) -> None:
    """A word from its file, its likeness turned up and down."""
    studio = Studio(graph, concept_world(world), CONCEPT_NOTES["one_concept"], words=True)
    with graph.group("1 Load"):
        studio.load_base()
        concept = _loaded(studio, world, "demo_hat", "my_hat")
    with graph.group("2 The word in a prompt"):
        word = world.pick(SHIPPED["demo_hat"].word, "<my-hat>")
        scene = world.pick(
            "photo of a person, surprised, green background, red shirt, wearing a {}",
            "photo of an old man wearing a {}, fishing at a lake",
        )
        prompts = studio.prompts(0, scene.format(word), scene.format(word))
        plain = studio.prompts(1, scene.format("hat"), scene.format("hat"))
    with graph.group("3 Likeness against obedience"):
        canvas = studio.canvas(0)
        drawn = [studio.draw(0, "Only its kind: a hat", studio.model, plain, canvas, 5)]
        for k, bias in enumerate(BIASES):
            model = _worn(studio, studio.model, concept, k % 2, bias=bias)
            drawn.append(studio.draw(k % 2, f"Bias {bias:g}", model, prompts, canvas, 5))
    with graph.group("4 Compare", width=640):
        labels = ("a hat", *(f"bias {bias:g}" for bias in BIASES))
        save_grid(studio, studio.grid(0, studio.batch(0, drawn), labels, 4), "one_concept")


def two_concepts(graph: Graph, world: World) -> None:
    """Two words in one prompt."""
    studio = Studio(graph, concept_world(world), CONCEPT_NOTES["two_concepts"], words=True)
    with graph.group("1 Load two words"):
        studio.load_base()
        hat = _loaded(studio, world, "demo_hat", "my_hat")
        cat = _loaded(studio, world, "demo_cat", "my_cat")
    with graph.group("2 Both on the model"):
        first = _worn(studio, studio.model, hat, 0, "The hat", combine="exact")
        both = _worn(studio, first, cat, 0, "And the cat", combine="exact")
        hat_word, cat_word = world.pick(
            [c.word for c in SHIPPED.values()], ["<my-hat>", "<my-cat>"]
        )
        prompts = studio.prompts(
            1,
            "photo of a person, smiling, yellow background, blue shirt, "
            f"wearing a {hat_word}, with a {cat_word}",
            f"photo of a {cat_word} wearing a {hat_word}, in a garden",
        )
    with graph.group("3 Draw"):
        drawn = studio.draw(0, "Both words", both, prompts, studio.canvas(0, batch=4), 11)
        studio.save(1, drawn, "two_concepts", "Both in one picture")


def concept_person(graph: Graph, world: World) -> None:
    """A DiffLoRA person with a taught thing."""
    studio = Studio(graph, world, CONCEPT_NOTES["concept_person"], words=True)
    with graph.group("1 Load"):
        photo = studio.photo(PERSON, "Photo of the person")
        studio.load()
    with graph.group("2 The person and the thing"):
        lora = studio.personalize(photo)["LORA_MODEL"]
        person = studio.dress(lora, 0, world.pick(0.6, 1.0))
        hat = _loaded(studio, world, "demo_hat", "my_hat", 1)
        model = _worn(studio, person, hat, 1)
    with graph.group("3 Draw three ways"):
        word = world.pick(SHIPPED["demo_hat"].word, "<my-hat>")
        prompts = studio.prompts(
            0,
            f"photo of a person, smiling, grey background, green shirt, wearing a {word}",
            f"photo of a person wearing a {word}, smiling, grey wall",
        )
        canvas = studio.canvas(0)
        drawn = [
            studio.draw(1, title, dressed, prompts, canvas, 21)
            for title, dressed in (
                ("The word alone", _worn(studio, studio.model, hat, 0, title="Only the thing")),
                ("The person alone", person),
                ("Both", model),
            )
        ]
    with graph.group("4 Compare", width=640):
        labels = ("photo", "the word alone", "the person alone", "both")
        everything = studio.batch(0, [photo, *drawn])
        save_grid(studio, studio.grid(0, everything, labels, 4), "concept_person")


def _lesson(studio: Studio) -> tuple[Out, Out]:
    """The pictures of one thing, and where it is on them."""
    add, numbers = studio.graph.add, range(LESSON_PHOTOS)
    with studio.graph.group("1 Pictures of one thing"):
        photos = [studio.photo(photo_name(k), f"Picture {k + 1}") for k in numbers]
        files = [photo_name(k, True) for k in numbers]
        masks = [
            add("LoadImageMask", 1, title=f"Where it is, {k + 1}", image=file, channel="red")
            for k, file in enumerate(files)
        ]
        places = [mask["MASK"] for mask in masks]
        together = add("BatchMasksNode", 1, title="All masks", masks=places)["MASK"]
        return studio.batch(0, photos, "All pictures"), together


def _loaded(studio: Studio, world: World, demo: str, sdxl: str, column: int = 0) -> Out:
    """A concept from its file; the studio's CLIP knows its word afterwards."""
    name = f"{world.pick(demo, sdxl)}.safetensors"
    node = studio.graph.add("DiffLoRA_LoadConcept", column, concept_name=name, clip=studio.clip)
    studio.clip = node["CLIP"]
    return node["concept"]


def _worn(
    studio: Studio, model: Out, concept: Out, column: int, title: str = "", **widgets: Any
) -> Out:
    """The model with a concept on it; the demo's gate is as sharp and as near as in training."""
    pick = studio.world.pick
    node = studio.graph.add(
        "DiffLoRA_ApplyConcept",
        column,
        title=title,
        model=model,
        concept=concept,
        **{"bias": 0.6, "temperature": pick(0.1, 0.15), "reach": pick(0, -1), **widgets},
    )
    return node["MODEL"]
