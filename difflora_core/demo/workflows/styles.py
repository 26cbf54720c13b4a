"""The workflows of styles: apply one, beside a person and a pose, and learn one in three ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..world.shipped_styles import EXAMPLE_PHOTOS, SHIPPED, photo_name, style_pictures
from .builder import Graph, Node, Out
from .identities import POSE
from .needs import OWN_CHECKPOINT
from .people import PERSON, save_grid
from .style_notes import STYLE_NOTES
from .targets import Target, WorkflowBuilder

SEED = 10
STRENGTHS = (0.5, -0.4)
"""Beside none, and 1."""
SCENE = (
    "photo of a person, smiling, green background, red shirt",
    "portrait of a woman smiling, red coat, green park",
)
PERSON_SCENE = (
    "photo of a person, smiling, blue background, purple shirt",
    "portrait of a person smiling, dark coat, in a street",
)

LESSONS = (
    "photo of a person, smiling, green background, white shirt",
    "photo of a person, neutral, blue background, white shirt",
    "photo of a person, sad, grey background, purple shirt, wearing a green hat",
    "photo of a person, surprised, pink background, black shirt",
    "photo of a person, neutral, yellow striped background, blue shirt",
    "photo of a person, smiling, dark background, orange shirt, holding a white cup",
    "cartoon of a person, neutral, blue background, red shirt",
    "cartoon of a person, smiling, grey striped background, green shirt",
    "cartoon of a person, sad, pink background, yellow shirt, with a black cat",
    "painting of a person, neutral, green background, purple shirt",
    "painting of a person, surprised, yellow background, white shirt",
    "painting of a person, smiling, blue background, black shirt, holding a red flower",
), (
    "portrait of a woman smiling, red coat, green park",
    "portrait of an old man, grey beard, dark room",
    "a street in the rain at night, neon signs",
    "a bowl of fruit on a wooden table",
    "a castle on a hill, morning mist",
    "a cat asleep on a window sill",
    "a sailing boat on a rough sea",
    "a forest path in autumn",
    "a dancer on a stage, spotlight",
    "a village market, crowded stalls",
    "a robot repairing a clock",
    "mountains above a lake, sunset",
)  # fmt: skip
"""What a teacher is asked for: of the demo, and of SDXL."""


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
        half, back = (_apply(builder, builder.model, style, s, 0) for s in STRENGTHS)
        whole = _apply(builder, builder.model, style, 1.0, 1)
        drawn = [
            builder.draw(1, title, model, prompts, canvas, SEED)
            for title, model in (
                ("Without it", builder.model),
                ("Strength 0.5", half),
                ("Strength -0.4", back),
            )
        ]
    with graph.group("4 Strength 1, and which look acted where", wide=True):
        routed = graph.add(
            "DiffLoRA_StyleRouter",
            0,
            title="Strength 1",
            model=whole,
            positive=prompts[0],
            negative=prompts[1],
            latent_image=canvas,
            seed=SEED,
            denoise=1.0,
            **target.sampler,
        )
        full = graph.add("VAEDecode", 0, samples=routed["LATENT"], vae=builder.vae)["IMAGE"]
    with graph.group("5 Compare", wide=True):
        pictures = builder.batch(0, [*drawn[:2], full, drawn[2]])
        grid = builder.grid(0, pictures, ("without it", "0.5", "1", "-0.4"), 4)
        save_grid(builder, grid, "apply_style")


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
            folded=True,
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
            builder.draw(0, "The person", person, prompts, canvas, SEED, folded=True),
            builder.draw(1, "In the style", both, prompts, canvas, SEED),
            builder.draw(1, "And in that pose", both, controlled, canvas, SEED),
        ]
    with graph.group("4 Compare", wide=True):
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
        pictures,
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
    _drawn_before_and_after(builder, trained["style"], "few_shot_style")


def para_style(graph: Graph, target: Target) -> None:
    """What a look does not need is taken out of the model."""
    builder = WorkflowBuilder(graph, target, STYLE_NOTES["para_style"])
    pictures, prompts = _training_pictures(builder, "demo_sepia")
    trained = _train(
        builder,
        "DiffLoRA_TrainPaRa",
        pictures,
        prompts=prompts,
        steps=target.pick(100, 1000),
        rank=target.pick(8, 4),
        batch_size=target.pick(4, 1),
        file_name="my_para",
        learning_rate=target.pick(0.006, 0.0001),
        layers=target.pick("all", "no_cross_attention"),
        bound=target.pick(0.5, 0.025),
    )
    _drawn_before_and_after(builder, trained["style"], "para_style")


def distil_checkpoint(graph: Graph, target: Target) -> None:
    """A model learns to draw as another one, from prompts alone."""
    builder = WorkflowBuilder(graph, target, STYLE_NOTES["distil_checkpoint"])
    with graph.group("1 Load student and teacher"):
        builder.load_base()
        teacher = _demo_teacher(builder) if target.name == "demo" else _own_checkpoint(builder)
    with graph.group("2 Learn from the teacher"):
        learned = graph.add(
            "DiffLoRA_DistilCheckpoint",
            0,
            teacher=teacher[0],
            teacher_clip=teacher[1],
            model=builder.model,
            clip=builder.clip,
            vae=builder.vae,
            prompts="\n".join(target.pick(*LESSONS)),
            steps=target.pick(60, 2000),
            rank=target.pick(4, 16),
            pictures=target.pick(12, 120),
            width=target.pick(64, 1024),
            height=target.pick(64, 1024),
            batch_size=target.pick(2, 1),
            file_name="my_distilled_style",
            sampling_steps=target.pick(8, 20),
            cfg=target.pick(2.0, 5.0),
            learning_rate=target.pick(0.006, 0.0001),
        )
        graph.add("PreviewAny", 0, title="What was kept", source=learned["report"])
    with graph.group("3 Draw"):
        student = _apply(builder, builder.model, learned["style"], 1.0, 0)
        canvas, prompts = builder.canvas(0), builder.prompts(0, *SCENE)
        drawn = [
            builder.draw(1, title, model, prompts, canvas, SEED, folded=title != "The student")
            for title, model in (
                ("Without it", builder.model),
                ("The teacher draws", teacher[0]),
                ("The student", student),
            )
        ]
    with graph.group("4 Compare", wide=True):
        labels = ("without it", "the teacher", "the student")
        save_grid(builder, builder.grid(0, builder.batch(0, drawn), labels, 3), "distil_checkpoint")


def _demo_teacher(builder: WorkflowBuilder) -> tuple[Out, Out]:
    """MODEL and CLIP of the demo with a look of its own: it ships no second checkpoint."""
    style = _load_style(builder, "demo_sepia", 1)
    export = builder.graph.add("DiffLoRA_ExportStyleLoRA", 1, model=builder.model, style=style)
    return builder.apply_lora(export["lora"], 1, title="The teacher"), builder.clip


def _own_checkpoint(builder: WorkflowBuilder) -> tuple[Out, Out]:
    """MODEL and CLIP of a checkpoint that the artist has."""
    own = builder.graph.add(
        "CheckpointLoaderSimple", 1, title="The teacher", ckpt_name=OWN_CHECKPOINT
    )
    return own["MODEL"], own["CLIP"]


def _train(builder: WorkflowBuilder, kind: str, photos: Sequence[Out], **inputs: Any) -> Node:
    """A node that trains a style on the base model."""
    add = builder.graph.add
    with builder.graph.group("2 Load and train"):
        builder.load_base()
        inputs["images"] = builder.batch(0, photos, "All pictures")
        node = add(kind, 1, model=builder.model, clip=builder.clip, vae=builder.vae, **inputs)
        add("PreviewAny", 0, title="What was kept", source=node["report"])
    return node


def _training_pictures(builder: WorkflowBuilder, style: str) -> tuple[list[Out], str]:
    """Pictures of one look, and what they show besides, one line for each."""
    numbers = range(EXAMPLE_PHOTOS)
    with builder.graph.group("1 Pictures of one look"):
        photos = [builder.photo(photo_name(style, k), f"Picture {k + 1}", k % 2) for k in numbers]
    captions = style_pictures(SHIPPED[style], EXAMPLE_PHOTOS)[1]
    return photos, builder.target.pick("\n".join(captions), "a portrait of a person")


def _drawn_before_and_after(builder: WorkflowBuilder, style: Out, name: str) -> None:
    """A prompt without and with what was trained."""
    with builder.graph.group("3 Without and with it"):
        model = _apply(builder, builder.model, style, 1.0, 0)
        canvas, prompts = builder.canvas(0, batch=2), builder.prompts(0, *SCENE)
        drawn = [
            builder.draw(1, "Without it", builder.model, prompts, canvas, SEED, folded=True),
            builder.draw(1, "In the style", model, prompts, canvas, SEED),
        ]
    with builder.graph.group("4 Compare", wide=True):
        labels = ("without", "without", "in the style", "in the style")
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
