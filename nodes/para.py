"""PaRa: take out of a model what its pictures do not share with the given ones."""

from typing import get_args, get_type_hints

from comfy_api.latest import io

from ..difflora_core.methods.base import PreparedAdaptation
from ..difflora_core.methods.para import BOUND, join
from ..difflora_core.training.para import PaRaObjective, PaRaTraining
from . import model_paths, sockets
from .host import training, training_widgets
from .host.memory import AUTO
from .host.picture_folders import TakesFolder, folder_pictures
from .host.training_request import PictureParts, PictureRequest

CATEGORY = "DiffLoRA/styles"


class TrainPaRa(TakesFolder):
    """Pictures in, a narrower model out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_TrainPaRa",
            display_name="Train PaRa",
            category=CATEGORY,
            description="Teaches a model a subject or a style from a few pictures by taking out of "
            "its layers what those pictures do not need, in half the numbers of a LoRA. It is kept "
            "in models/difflora_styles and fits every model of the same family. Stopping keeps the "
            "best so far; queueing again goes on.",
            search_aliases=["para", "parameter rank reduction", "dreambooth", "train style"],
            inputs=[
                *training_widgets.base_sockets(),
                io.String.Input(
                    "prompts",
                    default="a photo of a sks dog",
                    multiline=True,
                    tooltip="What the pictures show, one prompt a line; each picture is trained "
                    "with any of them. A rare word (sks) keeps the rest of its kind apart.",
                ),
                io.Int.Input("steps", default=1000, min=1, max=20_000, tooltip="Training steps."),
                io.Int.Input(
                    "rank",
                    default=4,
                    min=1,
                    max=128,
                    tooltip="Directions taken out of every layer. Higher: more faithful; lower: "
                    "more room for the prompt. 4 to 8 for SDXL.",
                ),
                *training_widgets.training_widgets(1, "my_para", model_paths.STYLES),
                *_long_tail(),
                io.Mask.Input("masks", optional=True, tooltip=training_widgets.MASKS),
                training_widgets.training_guidance(),
                *training_widgets.memory_widgets(),
                training_widgets.folder_widget(),
            ],
            outputs=training_widgets.style_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        images,
        prompts,
        steps,
        rank,
        batch_size,
        seed,
        file_name,
        mirror,
        small_file,
        learning_rate,
        layers,
        start,
        bound,
        masks=None,
        guidance=1.0,
        accumulate=1,
        memory=AUTO,
        folder=model_paths.NO_FILE,
    ):
        config = PaRaTraining(
            steps=steps,
            batch=batch_size,
            seed=seed,
            rank=rank,
            learning_rate=learning_rate,
            targets=layers,
            start=start,
            bound=bound,
            guidance=guidance,
            accumulate=accumulate,
        )
        more = folder_pictures(folder)
        request = PictureRequest(prompts, file_name, mirror, small_file, more=more)
        parts = PictureParts(model, clip, vae, images, None, masks)
        styles, _, report = training.train(PaRaObjective, config, request, parts, memory)
        return io.NodeOutput(styles[0], report)


class JoinPaRa(io.ComfyNode):
    """Two narrower models as one."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_JoinPaRa",
            display_name="Join PaRa",
            category=CATEGORY,
            description="Makes one of two PaRa, in no order: all that either takes out is gone. "
            "One after another in a chain, the second brings back a little of what the first took "
            "out.",
            search_aliases=["para", "combine styles", "merge styles"],
            inputs=[
                sockets.Style.Input("first", tooltip="A PaRa, from Train PaRa or a file."),
                sockets.Style.Input("second", tooltip="Another one, for the same base model."),
            ],
            outputs=[sockets.Style.Output(display_name="style", tooltip="For Apply Style.")],
        )

    @classmethod
    def execute(cls, first, second):
        return io.NodeOutput(PreparedAdaptation(join(first.adaptation, second.adaptation)))


def _long_tail() -> list[io.Input]:
    """What is seldom needed."""
    hints = get_type_hints(PaRaTraining)
    return [
        training_widgets.style_rate_widget("Learning rate of the directions.", 10.0),
        io.Combo.Input(
            "layers",
            options=list(get_args(hints["targets"])),
            default=PaRaTraining.targets,
            advanced=True,
            tooltip="Where: without the layers that read the prompt, which follows prompts best; "
            "attention alone, as most LoRAs; or all of these.",
        ),
        io.Combo.Input(
            "start",
            options=list(get_args(hints["start"])),
            default=PaRaTraining.start,
            advanced=True,
            tooltip="least_used: begins with the directions that the model needs least, and does "
            "next to no harm; warm_up: with random ones that fade in over the first tenth.",
        ),
        io.Float.Input(
            "bound",
            default=BOUND,
            min=0.001,
            max=1.0,
            step=0.001,
            advanced=True,
            tooltip="Largest share of a layer that all PaRa on a model may take out together; "
            "beyond 0.025 pictures collapse. Narrow models (the demo) need more.",
        ),
    ]


NODES = [TrainPaRa, JoinPaRa]
