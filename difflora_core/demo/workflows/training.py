"""The workflows of trained people: a LoRA from photos, and a prediction refined on its photo."""

from __future__ import annotations

from typing import Any

from .builder import Graph, Node, Out
from .people import MORE_PHOTOS, PERSON, save_grid
from .targets import SDXL_FACES, Target, WorkflowBuilder

TRAIN_NOTE = """
## Train a LoRA of a person
A few photos become a LoRA, with training; no DiffLoRA model is needed.

- **Photos**: connect more to *All photos*; ten to thirty of different places and moods are good. \
Photos of many sizes come from a folder loader.
- **captions** say what else is on each photo, one line each; what they name is not learned as \
part of the person. **trigger** puts a word before each.
- **face_analysis** cuts a square around small faces and leaves out photos without one.
- **Too little memory**: *memory* saving. **Stopping** keeps the best so far; queueing goes on.
- The report says what became of each odd photo."""
REFINE_NOTE = """
## Refine a prediction
*Personalize* predicts a LoRA from one photo in one pass; 25 steps of training on that photo bring \
it nearer to the person.

- **start_lora** may be any LoRA: *Load LoRA File* for one from disk. *rank* must be at least its \
own.
- **steps**: 25 to 100; more is more of this very photo, its light and clothes too.
- **factors: up** and **even_steps** keep it near the prediction."""
SCENE = (
    "photo of a person, smiling, yellow background, blue shirt",
    "portrait photo of a person smiling, blue shirt, yellow background, soft light",
)
CAPTIONS = (
    "photo of a person, neutral, blue background, white shirt",
    "photo of a person, smiling, grey background, green shirt",
    "photo of a person, surprised, striped yellow background, purple shirt",
)


def train_person(graph: Graph, target: Target) -> None:
    """Three photos become a LoRA."""
    builder = WorkflowBuilder(graph, target, TRAIN_NOTE)
    with graph.group("1 Photos"):
        names = (PERSON, *MORE_PHOTOS)
        photos = [builder.photo(name, f"Photo {k + 1}") for k, name in enumerate(names)]
        pictures = builder.batch(0, photos, "All photos")
    with graph.group("2 Load and train"):
        demo = builder.load_base()
        faces = demo["FACEANALYSIS"] if target.name == "demo" else _faces(graph)
        trained = _train(
            builder,
            pictures,
            captions="\n".join(CAPTIONS),
            steps=target.pick(200, 1000),
            rank=target.pick(4, 16),
            learning_rate=target.pick(0.02, 0.0001),
            batch_size=target.pick(4, 1),
            loss=target.pick("uniform", "min_snr"),
            even_steps=target.pick(True, False),
            mirror=target.pick(False, True),
            face_analysis=faces,
        )
        graph.add("PreviewAny", 0, title="What became of it", source=trained["report"])
    with graph.group("3 Draw"):
        model = builder.apply_lora(trained["LORA_MODEL"])
        prompts = builder.prompts(0, *SCENE)
        canvas = builder.canvas(0, batch=2)
        plain = builder.draw(1, "Without the LoRA", builder.model, prompts, canvas, 7)
        drawn = builder.draw(1, "With the LoRA", model, prompts, canvas, 7)
    with graph.group("4 Compare", wide=True):
        labels = ("base", "base", "trained", "trained")
        grid = builder.grid(0, builder.batch(0, [plain, drawn]), labels, 4, reference=photos[0])
        save_grid(builder, grid, "train_person")


def refine_person(graph: Graph, target: Target) -> None:
    """A prediction, and the same after a few steps on its photo."""
    builder = WorkflowBuilder(graph, target, REFINE_NOTE)
    with graph.group("1 Load"):
        photo = builder.photo(PERSON, "Photo of the person")
        builder.load()
    with graph.group("2 Predict, then refine"):
        predicted = builder.personalize(photo)["LORA_MODEL"]
        refined = _train(
            builder,
            photo,
            0,
            captions=target.pick(CAPTIONS[0], "photo of a person"),
            start_lora=predicted,
            steps=25,
            rank=target.pick(4, 16),
            learning_rate=0.002,
            batch_size=8,
            schedule="linear",
            loss="high_noise",
            factors="up",
            even_steps=True,
            mirror=False,
        )["LORA_MODEL"]
    with graph.group("3 Draw both"):
        prompts = builder.prompts(0, *SCENE)
        canvas = builder.canvas(0, batch=2)
        drawn = [
            builder.draw(1, title, builder.apply_lora(lora, 1), prompts, canvas, 7)
            for title, lora in (("Predicted", predicted), ("Refined", refined))
        ]
    with graph.group("4 Compare", wide=True):
        labels = ("predicted", "predicted", "refined", "refined")
        grid = builder.grid(0, builder.batch(0, drawn), labels, 4, reference=photo)
        save_grid(builder, grid, "refine_person")


def _faces(graph: Graph) -> Out:
    """The face analysis alone."""
    faces = graph.add("DiffLoRA_LoadFaceAnalysis", 0, package=SDXL_FACES, provider="cpu")
    return faces["FACEANALYSIS"]


def _train(builder: WorkflowBuilder, photos: Out, column: int = 1, **widgets: Any) -> Node:
    """Train Identity LoRA on photos."""
    return builder.graph.add(
        "DiffLoRA_TrainLoRA",
        column,
        model=builder.model,
        clip=builder.clip,
        vae=builder.vae,
        images=photos,
        **widgets,
    )
