"""Perfusion: teach a word from a few pictures."""

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..difflora_core.training.perfusion import PerfusionObjective, PerfusionTraining
from . import sockets
from .host import training, training_widgets
from .host.memory import AUTO
from .host.training_request import PictureParts, TrainingRequest

CATEGORY = "DiffLoRA/concepts"
CALIBRATION = 0.01  # as arXiv 2403.18551 weighs its two losses
NO_SECOND = "Train Perfusion Concept learned one word only: fill in second_word for another."


class TrainPerfusionConcept(io.ComfyNode):
    """Pictures in, word out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_TrainPerfusionConcept",
            display_name="Train Perfusion Concept",
            category=CATEGORY,
            description="Teaches the model a new word from one or a few pictures of a thing, an "
            "animal or a person, and keeps it in models/difflora_concepts (about 175 KiB for "
            "SDXL). Stopping keeps the best so far; queueing again goes on. Without masks the "
            "whole pictures count.",
            search_aliases=["perfusion", "textual inversion", "dreambooth", "train concept"],
            inputs=[
                *training_widgets.picture_sockets(),
                *training_widgets.word_widgets(),
                io.Int.Input(
                    "steps",
                    default=400,
                    min=1,
                    max=20_000,
                    tooltip="Training steps. 200 to 600 usually do.",
                ),
                *training_widgets.training_widgets(),
                io.Float.Input(
                    "value_rate",
                    default=0.03,
                    min=0.00001,
                    max=10.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Learning rate of the look.",
                ),
                io.Float.Input(
                    "word_rate",
                    default=0.006,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Learning rate of the word; 0 leaves it at its kind.",
                ),
                io.Mask.Input("masks", optional=True, tooltip=training_widgets.MASKS),
                *_seldom_needed(),
            ],
            outputs=[
                *training_widgets.training_outputs(),
                sockets.Concept.Output(
                    display_name="second_concept", tooltip="Of second_word, when there is one."
                ),
            ],
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
        value_rate,
        word_rate,
        masks=None,
        second_word="",
        second_superclass="",
        separation=CALIBRATION,
        binding=CALIBRATION,
        reach=-1,
        guidance=1.0,
        accumulate=1,
        memory=AUTO,
    ):
        rates = {
            "value_rate": value_rate,
            "word_rate": word_rate,
            "reach": reach,
            "guidance": guidance,
            "accumulate": accumulate,
        }
        if second_word.strip():
            rates |= {"separation": separation, "binding": binding}
        config = PerfusionTraining(steps=steps, batch=batch_size, seed=seed, **rates)
        request = TrainingRequest(
            prompts, file_name, mirror, small_file, word, superclass, second_word, second_superclass
        )
        parts = PictureParts(model, clip, vae, images, covariance, masks)
        concepts, clip, report = training.train(PerfusionObjective, config, request, parts, memory)
        second = concepts[1] if len(concepts) > 1 else ExecutionBlocker(NO_SECOND)
        return io.NodeOutput(concepts[0], clip, report, second)


def _seldom_needed() -> list[io.Input]:
    """Two things from the same pictures, kept apart by DisenDiff's losses; reach; guidance."""
    return [
        io.String.Input(
            "second_word",
            default="",
            optional=True,
            advanced=True,
            tooltip="A second new word, for another thing on the same pictures, one picture is "
            "enough. The prompts name both; masks, if any, cover both.",
        ),
        io.String.Input(
            "second_superclass",
            default="",
            optional=True,
            advanced=True,
            tooltip="One plain word for the kind of the second thing.",
        ),
        _calibration(
            "separation",
            "Two words: how hard their places in the picture are pushed apart; 0 is off.",
        ),
        _calibration(
            "binding",
            "Two words, in prompts that say the kind after the word (<my-hat> hat): how "
            "hard each word is drawn to the place of its kind; 0 is off.",
        ),
        sockets.reach_widget(
            "How many tokens around it the word learns through: -1 all, 0 itself alone, which "
            "keeps several words apart. Choose the same in Apply Concept.",
            optional=True,
        ),
        training_widgets.training_guidance(),
        *training_widgets.memory_widgets(),
    ]


def _calibration(name: str, tooltip: str) -> io.Input:
    return io.Float.Input(
        name,
        default=CALIBRATION,
        min=0.0,
        max=10.0,
        step=0.001,
        optional=True,
        advanced=True,
        tooltip=tooltip,
    )


NODES = [TrainPerfusionConcept]
