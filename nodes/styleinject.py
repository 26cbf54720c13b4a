"""StyleInject: learn a style from pictures; Load and Apply Style take the result."""

from comfy_api.latest import io

from ..difflora_core.adapters.styleinject import PRESETS
from ..difflora_core.training.styleinject import StyleInjectObjective, StyleInjectTraining
from . import model_paths
from .host import training, training_widgets
from .host.memory import AUTO
from .host.picture_folders import TakesFolder, folder_pictures
from .host.training_request import HeldOutRequest, PictureParts

CATEGORY = "DiffLoRA/styles"


class TrainStyleInject(TakesFolder):
    """Pictures in, style out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_TrainStyleInject",
            display_name="Train StyleInject",
            category=CATEGORY,
            description="Learns the look of pictures as a few styles, of which every picture takes "
            "its own mixture. It is kept in models/difflora_styles. Stopping keeps the best so "
            "far; queueing again goes on.",
            search_aliases=["styleinject", "train style", "fine-tune", "aesthetics", "adain"],
            inputs=[
                *training_widgets.base_sockets(),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="What the pictures show. As many lines as pictures: one for each, in "
                    "their order; fewer: each picture is trained with any of them.",
                ),
                io.Int.Input("steps", default=2000, min=1, max=100_000, tooltip="At most."),
                io.Int.Input(
                    "styles",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="How many styles it may mix. 1 for one artist; more for a collection.",
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=1024,
                    tooltip="Size of each. Higher: more faithful, a larger file.",
                ),
                *training_widgets.training_widgets(4, "my_style", model_paths.STYLES),
                *_long_tail(),
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
        styles,
        rank,
        batch_size,
        seed,
        file_name,
        mirror,
        small_file,
        learning_rate,
        layers,
        held_out,
        guidance=1.0,
        accumulate=1,
        memory=AUTO,
        folder=model_paths.NO_FILE,
    ):
        config = StyleInjectTraining(
            steps=steps,
            batch=batch_size,
            seed=seed,
            learning_rate=learning_rate,
            plan=PRESETS[layers].of_size(styles, rank),
            guidance=guidance,
            accumulate=accumulate,
        )
        more = folder_pictures(folder)
        request = HeldOutRequest(prompts, file_name, mirror, small_file, held_out, more=more)
        parts = PictureParts(model, clip, vae, images, None, None)
        made, _, report = training.train(StyleInjectObjective, config, request, parts, memory)
        return io.NodeOutput(made[0], report)


def _long_tail() -> list[io.Input]:
    """What is seldom needed."""
    return [
        training_widgets.style_rate_widget("Learning rate, constant."),
        io.Combo.Input(
            "layers",
            options=list(PRESETS),
            default="recommended",
            advanced=True,
            tooltip="recommended: queries and values of attention, another spread for queries; "
            "paper_table: another spread for values too; distillation: convolutions too.",
        ),
        training_widgets.held_out_widget("pictures"),
    ]


NODES = [TrainStyleInject]
