"""Infusion: teach a word by value residuals alone; Load and Apply Concept take the result."""

from comfy_api.latest import io

from ..difflora_core.training.infusion import InfusionObjective, InfusionTraining
from .host import training, training_widgets
from .host.memory import AUTO
from .host.training_request import PictureParts, TrainingRequest

CATEGORY = "DiffLoRA/concepts"


class TrainInfusionConcept(io.ComfyNode):
    """Pictures in, word out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_TrainInfusionConcept",
            display_name="Train Infusion Concept",
            category=CATEGORY,
            description="Teaches a new word that leaves the layout wholly to the word of its kind "
            "(cat, hat) and changes its look alone, with the least harm to the rest of the prompt. "
            "Stopping keeps the best so far; queueing again goes on.",
            search_aliases=["infusion", "train concept", "value residual"],
            inputs=[
                *training_widgets.picture_sockets(),
                *training_widgets.word_widgets(),
                io.Int.Input("steps", default=500, min=1, max=20_000, tooltip="Training steps."),
                *training_widgets.training_widgets(),
                io.Float.Input(
                    "learning_rate",
                    default=0.01,
                    min=0.00001,
                    max=10.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Learning rate of the look.",
                ),
                io.Mask.Input("masks", optional=True, tooltip=training_widgets.MASKS),
                training_widgets.training_guidance(),
                *training_widgets.memory_widgets(),
            ],
            outputs=training_widgets.training_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        images,
        covariance,
        word,
        superclass,
        prompts,
        steps,
        batch_size,
        seed,
        file_name,
        mirror,
        small_file,
        learning_rate,
        masks=None,
        guidance=1.0,
        accumulate=1,
        memory=AUTO,
    ):
        rates = {"learning_rate": learning_rate, "guidance": guidance, "accumulate": accumulate}
        config = InfusionTraining(steps=steps, batch=batch_size, seed=seed, **rates)
        request = TrainingRequest(prompts, file_name, mirror, small_file, word, superclass)
        parts = PictureParts(model, clip, vae, images, covariance, masks)
        concepts, clip, report = training.train(InfusionObjective, config, request, parts, memory)
        return io.NodeOutput(concepts[0], clip, report)


NODES = [TrainInfusionConcept]
