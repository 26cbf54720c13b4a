"""Perfusion: teach a word from a few pictures, and balance its look against the prompt."""

from typing import get_args

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..difflora_core.methods.perfusion import Lock, PerfusionConfig
from ..difflora_core.training.perfusion import PerfusionTraining, train_perfusion
from . import sockets
from .host import adapters as concept_host
from .host import training as concept_training
from .host.training_request import TrainingRequest

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
            "animal or a person, and keeps it in models/difflora_concepts (about 170 KB for SDXL). "
            "Stopping keeps the best so far; queueing again goes on. Without masks the whole "
            "pictures count.",
            search_aliases=["perfusion", "textual inversion", "dreambooth", "train concept"],
            inputs=[
                *concept_training.picture_sockets(),
                *concept_training.word_widgets(),
                io.Int.Input(
                    "steps",
                    default=400,
                    min=1,
                    max=20_000,
                    tooltip="Training steps. 200 to 600 usually do.",
                ),
                *concept_training.training_widgets(),
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
                io.Mask.Input("masks", optional=True, tooltip=concept_training.MASKS),
                *_seldom_needed(),
            ],
            outputs=[
                *concept_training.training_outputs(),
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
    ):
        rates = {
            "value_rate": value_rate,
            "word_rate": word_rate,
            "reach": reach,
            "guidance": guidance,
        }
        if second_word.strip():
            rates |= {"separation": separation, "binding": binding}
        config = PerfusionTraining(steps=steps, batch=batch_size, seed=seed, **rates)
        request = TrainingRequest(
            word, superclass, prompts, file_name, mirror, small_file, second_word, second_superclass
        )
        parts = concept_training.Parts(model, clip, vae, images, covariance, masks)
        concepts, clip, report = concept_training.train(train_perfusion, config, request, parts)
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
        _reach(
            "How many tokens around it the word learns through: -1 all, 0 itself alone, which "
            "keeps several words apart. Choose the same in Apply Concept.",
            optional=True,
        ),
        concept_training.training_guidance(),
    ]


def _calibration(name: str, tooltip: str) -> io.Input:
    return io.Float.Input(
        name, default=CALIBRATION, min=0.0, max=10.0, step=0.001,
        optional=True, advanced=True, tooltip=tooltip,
    )  # fmt: skip


def _percent(name: str, default: float, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def _reach(tooltip: str, optional: bool = False) -> io.Input:
    return io.Int.Input(
        "reach", default=-1, min=-1, max=512, optional=optional, advanced=True, tooltip=tooltip
    )


class ApplyConcept(io.ComfyNode):
    """A concept on a model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_ApplyConcept",
            display_name="Apply Concept",
            category=CATEGORY,
            description="Gives a concept its look. Bias and temperature balance likeness against "
            "the prompt without training again; chain several of these for several concepts. The "
            "model's weights stay as they are, so it works with LoRA, ControlNet and fp8.",
            search_aliases=["perfusion", "infusion", "key lock", "concept strength"],
            inputs=[
                io.Model.Input("model", tooltip="The model; it stays as it is for other nodes."),
                sockets.Concept.Input("concept", tooltip="From Load Concept or a training node."),
                *_knobs(),
                *_span(),
                *_long_tail(),
                io.Conditioning.Input(
                    "superclass_prompt",
                    optional=True,
                    tooltip="The same prompt with the word of its kind instead of the new word, "
                    "from CLIP Text Encode. Needed by the global lock.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model,
        concept,
        bias,
        temperature,
        strength,
        lock,
        start_percent,
        end_percent,
        combine,
        reach,
        superclass_prompt=None,
    ):
        config = PerfusionConfig(bias, temperature, strength, lock, reach)
        prompt = None if superclass_prompt is None else superclass_prompt[0][0]
        applied = concept_host.applied(
            concept, config, (start_percent, end_percent), prompt if lock == "global" else None
        )
        return io.NodeOutput(concept_host.apply_concept(model, applied, combine == "exact"))


def _knobs() -> list[io.Input]:
    """What an artist turns."""
    return [
        io.Float.Input(
            "bias",
            default=0.6,
            min=-2.0,
            max=3.0,
            step=0.01,
            tooltip="How like the concept a word must be to get its look. Lower: more "
            "likeness; higher: more obedience to the prompt. (Perfusion only.)",
        ),
        io.Float.Input(
            "temperature",
            default=0.15,
            min=0.01,
            max=10.0,
            step=0.01,
            tooltip="Softness of that choice. (Perfusion only.)",
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.01,
            tooltip="0 leaves the model alone, 1 is the whole concept.",
        ),
        io.Combo.Input(
            "lock",
            options=list(get_args(Lock)),
            default="local",
            tooltip="Where the concept may appear. local: where its kind (cat, hat) would; "
            "global: the whole layout follows the prompt with that word, which must be "
            "connected as superclass_prompt; none: as the new word likes. "
            "(Perfusion only.)",
        ),
    ]


def _span() -> list[io.Input]:
    """When the concept acts."""
    return [
        _percent("start_percent", 0.0, "From which share of the steps on it acts."),
        _percent("end_percent", 1.0, "Up to which share of the steps it acts."),
    ]


def _long_tail() -> list[io.Input]:
    """What is seldom needed."""
    return [
        io.Combo.Input(
            "combine",
            options=["approximate", "exact"],
            default="approximate",
            advanced=True,
            tooltip="Several concepts: exact keeps those apart that resemble each other.",
        ),
        _reach(
            "How many tokens around its word a concept acts on: -1 all, 0 the word alone. "
            "(Perfusion only.)"
        ),
    ]
