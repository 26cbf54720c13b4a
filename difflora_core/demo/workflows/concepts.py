"""The workflows of taught words: train one, use one, use two, and let a person wear one."""

from __future__ import annotations

from typing import Any

from ..world.concept_examples import EXAMPLE, EXAMPLE_PHOTOS, SHIPPED, example_prompts, photo_name
from .builder import Graph, Out
from .concept_notes import CONCEPT_NOTES
from .people import PERSON, save_grid
from .targets import Target, WorkflowBuilder

BIASES = (1.1, 0.95, 0.6)


def teach_concept(graph: Graph, target: Target) -> None:
    """Three pictures and their masks become a word."""
    builder = WorkflowBuilder(graph, target, CONCEPT_NOTES["teach_concept"])
    add = graph.add
    pictures, places = _training_photos(builder)
    with graph.group("2 Load and train"):
        builder.load_base()
        covariance = add(
            "DiffLoRA_BuildCovariance",
            0,
            clip=builder.clip,
            captions=target.pick("demo", "general"),
            count=target.pick(2000, 20_000),
            file_name=target.pick("difflora_demo", "sdxl"),
        )
        word = EXAMPLE.word
        trained = add(
            "DiffLoRA_TrainPerfusionConcept",
            1,
            model=builder.model,
            clip=builder.clip,
            vae=builder.vae,
            images=pictures,
            covariance=covariance["covariance"],
            masks=places,
            word=word,
            superclass="hat",
            prompts=target.pick("\n".join(example_prompts()), ""),
            steps=target.pick(100, 400),
            value_rate=target.pick(1.0, 0.03),
            word_rate=target.pick(0.001, 0.006),
            file_name=target.pick("difflora_demo_hat", "my_hat"),
            mirror=target.pick(False, True),
            reach=target.pick(0, -1),
            guidance=target.pick(1.5, 1.0),
        )
        add("PreviewAny", 0, title="What was kept", source=trained["report"])
    with graph.group("3 The word in a prompt"):
        apply = _apply_concept(builder, builder.model, trained["concept"], 0)
        builder.clip = trained["CLIP"]
        prompts = builder.prompts(
            0,
            f"photo of a person, smiling, blue background, white shirt, wearing a {word}",
            f"photo of a woman wearing a {word}, city street, soft light",
        )
        drawn = builder.draw(1, "Draw", apply, prompts, builder.canvas(1, batch=4), 7)
        builder.save(2, drawn, "taught_word", "The taught hat")


def one_concept(graph: Graph, target: Target) -> None:
    """A word from its file, its likeness turned up and down."""
    builder = WorkflowBuilder(graph, target, CONCEPT_NOTES["one_concept"])
    with graph.group("1 Load"):
        builder.load_base()
        concept = _load_concept(builder, target, "demo_hat", "my_hat")
    with graph.group("2 The word in a prompt"):
        word = target.pick(SHIPPED["demo_hat"].word, "<my-hat>")
        scene = target.pick(
            "photo of a person, surprised, green background, red shirt, wearing a {}",
            "photo of an old man wearing a {}, fishing at a lake",
        )
        prompts = builder.prompts(0, scene.format(word), scene.format(word))
        plain = builder.prompts(1, scene.format("hat"), scene.format("hat"))
    with graph.group("3 Likeness against prompt agreement"):
        canvas = builder.canvas(0)
        drawn = [builder.draw(0, "Only its kind: a hat", builder.model, plain, canvas, 5)]
        for k, bias in enumerate(BIASES):
            model = _apply_concept(builder, builder.model, concept, k % 2, bias=bias)
            drawn.append(builder.draw(k % 2, f"Bias {bias:g}", model, prompts, canvas, 5))
    with graph.group("4 Compare", wide=True):
        labels = ("a hat", *(f"bias {bias:g}" for bias in BIASES))
        save_grid(builder, builder.grid(0, builder.batch(0, drawn), labels, 4), "one_concept")


def two_concepts(graph: Graph, target: Target) -> None:
    """Two words in one prompt."""
    builder = WorkflowBuilder(graph, target, CONCEPT_NOTES["two_concepts"])
    with graph.group("1 Load two words"):
        builder.load_base()
        hat = _load_concept(builder, target, "demo_hat", "my_hat")
        cat = _load_concept(builder, target, "demo_cat", "my_cat")
    with graph.group("2 Both on the model"):
        first = _apply_concept(builder, builder.model, hat, 0, "The hat", combine="exact")
        both = _apply_concept(builder, first, cat, 0, "And the cat", combine="exact")
        hat_word, cat_word = target.pick(
            [c.word for c in SHIPPED.values()], ["<my-hat>", "<my-cat>"]
        )
        prompts = builder.prompts(
            1,
            "photo of a person, smiling, yellow background, blue shirt, "
            f"wearing a {hat_word}, with a {cat_word}",
            f"photo of a {cat_word} wearing a {hat_word}, in a garden",
        )
    with graph.group("3 Draw"):
        drawn = builder.draw(0, "Both words", both, prompts, builder.canvas(0, batch=4), 11)
        builder.save(1, drawn, "two_concepts", "Both in one picture")


def concept_person(graph: Graph, target: Target) -> None:
    """A DiffLoRA person with a taught thing."""
    builder = WorkflowBuilder(graph, target, CONCEPT_NOTES["concept_person"])
    with graph.group("1 Load"):
        photo = builder.photo(PERSON, "Photo of the person")
        builder.load()
    with graph.group("2 The person and the thing"):
        lora = builder.personalize(photo)["LORA_MODEL"]
        person = builder.apply_lora(lora, 0, target.pick(0.6, 1.0))
        hat = _load_concept(builder, target, "demo_hat", "my_hat", 1)
        model = _apply_concept(builder, person, hat, 1)
    with graph.group("3 Draw three ways"):
        word = target.pick(SHIPPED["demo_hat"].word, "<my-hat>")
        prompts = builder.prompts(
            0,
            f"photo of a person, smiling, grey background, green shirt, wearing a {word}",
            f"photo of a person wearing a {word}, smiling, grey wall",
        )
        canvas = builder.canvas(0)
        drawn = [
            builder.draw(1, title, applied, prompts, canvas, 21)
            for title, applied in (
                (
                    "The word alone",
                    _apply_concept(builder, builder.model, hat, 0, title="Only the thing"),
                ),
                ("The person alone", person),
                ("Both", model),
            )
        ]
    with graph.group("4 Compare", wide=True):
        labels = ("photo", "the word alone", "the person alone", "both")
        everything = builder.batch(0, [photo, *drawn])
        save_grid(builder, builder.grid(0, everything, labels, 4), "concept_person")


def _training_photos(builder: WorkflowBuilder) -> tuple[Out, Out]:
    """The pictures of one thing, and where it is on them."""
    add, numbers = builder.graph.add, range(EXAMPLE_PHOTOS)
    with builder.graph.group("1 Pictures of one thing"):
        photos = [builder.photo(photo_name(k), f"Picture {k + 1}") for k in numbers]
        files = [photo_name(k, True) for k in numbers]
        masks = [
            add(
                "LoadImageMask",
                1,
                title=f"Where it is, {k + 1}",
                folded=True,
                image=file,
                channel="red",
            )
            for k, file in enumerate(files)
        ]
        places = [mask["MASK"] for mask in masks]
        together = add("BatchMasksNode", 1, title="All masks", masks=places)["MASK"]
        return builder.batch(0, photos, "All pictures"), together


def _load_concept(
    builder: WorkflowBuilder, target: Target, demo: str, sdxl: str, column: int = 0
) -> Out:
    """A concept from its file; the builder's CLIP knows its word afterwards."""
    name = f"{target.pick(demo, sdxl)}.safetensors"
    node = builder.graph.add("DiffLoRA_LoadConcept", column, concept_name=name, clip=builder.clip)
    builder.clip = node["CLIP"]
    return node["concept"]


def _apply_concept(
    builder: WorkflowBuilder, model: Out, concept: Out, column: int, title: str = "", **widgets: Any
) -> Out:
    """The model with a concept on it; the demo's gate is as sharp and as near as in training."""
    pick = builder.target.pick
    node = builder.graph.add(
        "DiffLoRA_ApplyConcept",
        column,
        title=title,
        model=model,
        concept=concept,
        **{"bias": 0.6, "temperature": pick(0.1, 0.15), "reach": pick(0, -1), **widgets},
    )
    return node["MODEL"]
