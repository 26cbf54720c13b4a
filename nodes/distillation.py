"""Distil Checkpoint: a style learns to draw as another checkpoint does."""

from comfy_api.latest import io

from ..difflora_core.training.distillation import DistillationLoss
from ..difflora_core.training.distillation_data import DistillationPictures
from ..difflora_core.training.recipes import default_distillation, distillation_recipes
from . import model_paths, sockets
from .host import training_widgets
from .host.distillation import DistillationParts, DistillationRequest, distil
from .host.memory import AUTO

RECIPES = distillation_recipes()
PATIENCE = 10
"""Looks at the held-out prompts without a gain before training stops."""


class DistilCheckpoint(io.ComfyNode):
    """Two checkpoints in, style out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_DistilCheckpoint",
            display_name="Distil Checkpoint",
            category="DiffLoRA/styles",
            description="Teaches a model to draw as another one, from prompts alone, without any "
            "pictures: the teacher draws them. What is learned is a small style, kept in "
            "models/difflora_styles. Stopping keeps the best so far; queueing again goes on.",
            search_aliases=["distillation", "teacher", "student", "extract style", *RECIPES],
            inputs=[
                *_models(),
                *_subject(),
                *_pictures(),
                *_course(),
                *_weights(),
                *_long_tail(),
                *training_widgets.memory_widgets(),
            ],
            outputs=[
                sockets.Style.Output(display_name="style", tooltip="For Apply Style."),
                io.String.Output(
                    display_name="report", tooltip="File, steps, loss, and what was compared."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompt_file):
        return model_paths.problem(model_paths.prompt_file, prompt_file)

    @classmethod
    def fingerprint_inputs(cls, prompt_file, **others):
        path = model_paths.prompt_file(prompt_file)
        return model_paths.fingerprint(path) if path else None

    @classmethod
    def execute(
        cls,
        teacher,
        teacher_clip,
        model,
        clip,
        vae,
        prompts,
        prompt_file,
        method,
        steps,
        rank,
        pictures,
        width,
        height,
        batch_size,
        seed,
        file_name,
        source,
        sampling_steps,
        cfg,
        output_weight,
        feature_weight,
        learning_rate,
        held_out,
        small_file,
        accumulate=1,
        memory=AUTO,
    ):
        recipe = RECIPES[method]
        course = {"steps": steps, "batch": batch_size, "seed": seed, "patience": PATIENCE}
        course |= {"learning_rate": learning_rate, "accumulate": accumulate}
        config = recipe.Config.for_distillation(rank, **course)
        request = DistillationRequest(
            prompts=prompts,
            prompt_file=prompt_file,
            file_name=file_name,
            small_file=small_file,
            width=width,
            height=height,
            held_out=held_out,
            loss=DistillationLoss(output_weight, feature_weight),
            pictures=DistillationPictures(source, pictures, sampling_steps, cfg, seed),
        )
        parts = DistillationParts(teacher, teacher_clip, model, clip, vae)
        styles, report = distil(recipe, config, request, parts, memory)
        return io.NodeOutput(styles[0], report)


def _models() -> list[io.Input]:
    """Teacher and student."""
    return [
        io.Model.Input(
            "teacher",
            tooltip="Draws as you want it: a fine-tune of the student's family, or the student "
            "with LoRAs on it.",
        ),
        io.Clip.Input("teacher_clip", tooltip="The teacher's CLIP."),
        io.Model.Input("model", tooltip="The student: the base model that the style is for."),
        io.Clip.Input("clip", tooltip="The student's CLIP; it may read another language."),
        io.Vae.Input("vae", tooltip="The student's VAE."),
    ]


def _pictures() -> list[io.Input]:
    """What the teacher draws."""
    size = {"default": 1024, "min": 64, "max": 8192, "step": 8}
    return [
        io.Int.Input(
            "pictures",
            default=64,
            min=1,
            max=10_000,
            tooltip="How many pictures the teacher draws to teach from, of each prompt in turn.",
        ),
        io.Int.Input("width", **size, tooltip="Of them; what the model draws (1024 for SDXL)."),
        io.Int.Input("height", **size, tooltip="Of them."),
    ]


def _subject() -> list[io.Input]:
    """What is learned, and in what form."""
    return [
        io.String.Input(
            "prompts",
            default="",
            multiline=True,
            tooltip="What the style is to be used for, one prompt a line; dozens or more. "
            "Where the teacher reads another language: red hat => its words for it.",
        ),
        io.Combo.Input(
            "prompt_file",
            options=model_paths.prompt_files(),
            default=model_paths.NO_FILE,
            tooltip="More prompts: a .txt file in the input folder, one a line.",
        ),
        io.Combo.Input(
            "method",
            options=list(RECIPES),
            default=default_distillation(),
            tooltip="What the style is made of; each has a training node of its own.",
        ),
        io.Int.Input("steps", default=2000, min=1, max=100_000, tooltip="At most."),
        io.Int.Input(
            "rank",
            default=16,
            min=1,
            max=1024,
            tooltip="Size of the style. Higher: nearer to the teacher, a larger file.",
        ),
    ]


def _course() -> list[io.Input]:
    """How it is learned, and where it is kept."""
    return [
        training_widgets.batch_size_widget(2),
        training_widgets.seed_widget("noise, of the teacher's pictures and of their order"),
        training_widgets.file_name_widget("my_distilled_style", model_paths.STYLES),
    ]


def _weights() -> list[io.Input]:
    """How the teacher draws and what of it counts; seldom needed."""
    weight = {"min": 0.0, "max": 1000.0, "step": 0.01, "round": 0.0001, "advanced": True}
    return [
        io.Combo.Input(
            "source",
            options=["teacher", "noise"],
            default="teacher",
            advanced=True,
            tooltip="teacher: it draws the pictures first; noise: no pictures, which is quicker "
            "and teaches less.",
        ),
        io.Int.Input(
            "sampling_steps",
            default=20,
            min=1,
            max=1000,
            advanced=True,
            tooltip="Steps of each of the teacher's pictures.",
        ),
        io.Float.Input(
            "cfg",
            default=5.0,
            min=1.0,
            max=30.0,
            step=0.1,
            advanced=True,
            tooltip="How strictly the teacher's pictures follow the prompts.",
        ),
        io.Float.Input(
            "output_weight",
            default=1.0,
            **weight,
            tooltip="How much it counts what both models predict.",
        ),
        io.Float.Input(
            "feature_weight",
            default=0.1,
            **weight,
            tooltip="How much it counts what each block makes on the way. Only where both models "
            "have the same text encoders.",
        ),
    ]


def _long_tail() -> list[io.Input]:
    """What is seldom needed."""
    return [
        training_widgets.style_rate_widget("Learning rate."),
        training_widgets.held_out_widget("prompts"),
        training_widgets.small_file_widget("style"),
    ]
