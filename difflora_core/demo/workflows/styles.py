"""The workflows of styles: apply one, beside a person and a pose, and learn one in two ways."""

from __future__ import annotations

from typing import Any

from ..world.shipped_styles import EXAMPLE_PHOTOS, SHIPPED, photo_name, style_pictures
from .builder import GRID_COLUMN, Graph, Node, Out
from .identities import POSE
from .people import PERSON, save_grid
from .style_notes import STYLE_NOTES
from .targets import Target, WorkflowBuilder

SEED = 10
STRENGTHS = (0.0, 0.5, 1.0, -0.4)
SCENE = (
    "photo of a person, smiling, green background, red shirt",
    "portrait of a woman smiling, red coat, green park",
)
PERSON_SCENE = (
    "photo of a person, smiling, blue background, purple shirt",
    "portrait of a person smiling, dark coat, in a street",
)
OTHER_SCENE = (
    "photo of a person, surprised, blue background, orange shirt",
    "photo of an old man with a hat, fishing at a lake",
)


def apply_style(graph: Graph, target: Target) -> None:
    """A style from its file at several strengths, and what its router did."""
    builder = WorkflowBuilder(graph, target, STYLE_NOTES["apply_style"])
    with graph.group("1 Load"):
        builder.load_base()
        style = _load_style(builder, "demo_cyanotype")
    with graph.group("2 The prompt"):
        prompts = builder.prompts(0, *SCENE)
        canvas = builder.canvas(0)
    with graph.group("3 Strength"):
        models = [_apply(builder, builder.model, style, s, k % 2) for k, s in enumerate(STRENGTHS)]
        titles = [f"Strength {strength:g}" for strength in STRENGTHS]
        drawn = [
            builder.draw(k % 2, title, model, prompts, canvas, SEED)
            for k, (title, model) in enumerate(zip(titles, models, strict=True))
        ]
    with graph.group("4 Compare", width=640):
        grid = builder.grid(0, builder.batch(0, drawn), [t.lower() for t in titles], 4)
        save_grid(builder, grid, "apply_style")
    with graph.group("5 Which look acted where", below=True, width=GRID_COLUMN):
        graph.add(
            "DiffLoRA_StyleRouter",
            0,
            model=models[2],
            positive=prompts[0],
            negative=prompts[1],
            latent_image=canvas,
            seed=SEED,
            denoise=1.0,
            **target.sampler,
        )


def style_person(graph: Graph, target: Target) -> None:
    """A person, then the style, then the pose."""
    builder = WorkflowBuilder(graph, target, STYLE_NOTES["style_person"])
    with graph.group("1 Load"):
        photo = builder.photo(PERSON, "Photo of the person")
        posed = builder.photo(POSE, "Pose photo")
        builder.load(1, control=True)
        style = _load_style(builder, "demo_sepia", 1)
    with graph.group("2 Person, style and pose"):
        lora = builder.personalize(photo)["LORA_MODEL"]
        person = builder.apply_lora(lora, 0, target.pick(0.6, 1.0))
        both = _apply(builder, person, style, 0.8, 0)
        points = graph.add(
            "DiffLoRA_ExtractFeatures",
            1,
            title="Face points of the pose",
            images=posed,
            clip_vision=builder.clip_vision,
            face_analysis=builder.faces,
        )["keypoints"]
        prompts = builder.prompts(1, *PERSON_SCENE)
        steered = graph.add(
            "ControlNetApplyAdvanced",
            1,
            positive=prompts[0],
            negative=prompts[1],
            control_net=builder.control_net,
            image=points,
            strength=target.pick(1.0, 0.8),
            start_percent=0.0,
            end_percent=1.0,
        )
        controlled = (steered["positive"], steered["negative"])
    with graph.group("3 One by one"):
        canvas = builder.canvas(0)
        drawn = [
            builder.draw(0, "The person", person, prompts, canvas, SEED),
            builder.draw(1, "In the style", both, prompts, canvas, SEED),
            builder.draw(1, "And in that pose", both, controlled, canvas, SEED),
        ]
    with graph.group("4 Compare", width=GRID_COLUMN):
        labels = ("the person", "in the style", "and in that pose")
        grid = builder.grid(0, builder.batch(0, drawn), labels, 3, reference=photo)
        save_grid(builder, grid, "style_person")


def few_shot_style(graph: Graph, target: Target) -> None:
    """A few pictures become a style that mixes several looks."""
    builder = WorkflowBuilder(graph, target, STYLE_NOTES["few_shot_style"])
    pictures, prompts = _training_pictures(builder, "demo_cyanotype")
    trained = _train(
        builder,
        "DiffLoRA_TrainStyleInject",
        images=pictures,
        prompts=prompts,
        steps=target.pick(100, 800),
        styles=2,
        rank=target.pick(4, 16),
        batch_size=4,
        file_name="my_style",
        learning_rate=target.pick(0.006, 0.0001),
        layers=target.pick("distillation", "recommended"),
        held_out=0,
    )
    _drawn_before_and_after(builder, trained["style"], trained["report"], "few_shot_style")


def para_style(graph: Graph, target: Target) -> None:
    """What a look does not need is taken out of the model."""
    builder = WorkflowBuilder(graph, target, STYLE_NOTES["para_style"])
    pictures, prompts = _training_pictures(builder, "demo_sepia")
    trained = _train(
        builder,
        "DiffLoRA_TrainPaRa",
        images=pictures,
        prompts=prompts,
        steps=target.pick(100, 1000),
        rank=target.pick(8, 4),
        batch_size=target.pick(4, 1),
        file_name="my_para",
        learning_rate=target.pick(0.006, 0.0001),
        layers=target.pick("all", "no_cross_attention"),
        bound=target.pick(0.5, 0.025),
    )
    _drawn_before_and_after(builder, trained["style"], trained["report"], "para_style")


def _train(builder: WorkflowBuilder, kind: str, **inputs: Any) -> Node:
    """A node that trains a style on the base model."""
    with builder.graph.group("2 Load and train"):
        builder.load_base()
        return builder.graph.add(
            kind, 0, model=builder.model, clip=builder.clip, vae=builder.vae, **inputs
        )


def _training_pictures(builder: WorkflowBuilder, style: str) -> tuple[Out, str]:
    """Pictures of one look, and what they show besides, one line for each."""
    numbers = range(EXAMPLE_PHOTOS)
    with builder.graph.group("1 Pictures of one look"):
        photos = [builder.photo(photo_name(style, k), f"Picture {k + 1}", k % 2) for k in numbers]
        captions = style_pictures(SHIPPED[style], EXAMPLE_PHOTOS)[1]
        return builder.batch(0, photos, "All pictures"), builder.target.pick(
            "\n".join(captions), "a portrait of a person"
        )


def _drawn_before_and_after(builder: WorkflowBuilder, style: Out, report: Out, name: str) -> None:
    """Two prompts without and with what was trained."""
    with builder.graph.group("3 Without and with it"):
        builder.graph.add("PreviewAny", 0, title="What was kept", source=report)
        model = _apply(builder, builder.model, style, 1.0, 0)
        canvas, drawn = builder.canvas(0), []
        for column, scene in enumerate((SCENE, OTHER_SCENE)):
            prompts = builder.prompts(column, *scene)
            drawn += [
                builder.draw(column, "Without it", builder.model, prompts, canvas, SEED),
                builder.draw(column, "In the style", model, prompts, canvas, SEED),
            ]
    with builder.graph.group("4 Compare", width=640):
        labels = ("without", "in the style") * 2
        save_grid(builder, builder.grid(0, builder.batch(0, drawn), labels, 4), name)


def _load_style(builder: WorkflowBuilder, demo: str, column: int = 0) -> Out:
    """A style from its file."""
    name = f"{builder.target.pick(demo, 'my_style')}.safetensors"
    return builder.graph.add("DiffLoRA_LoadStyle", column, style_name=name)["style"]


def _apply(builder: WorkflowBuilder, model: Out, style: Out, strength: float, column: int) -> Out:
    """The model with a style on it."""
    node = builder.graph.add(
        "DiffLoRA_ApplyStyle", column, model=model, style=style, strength=strength
    )
    return node["model"]
