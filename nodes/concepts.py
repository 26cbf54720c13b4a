"""Around concepts of any method: load and apply one, build what training needs, export a LoRA."""

import torch
from comfy_api.latest import io, ui

from ..difflora_core.errors import counted
from ..difflora_core.lora.formats.state_dict import to_state_dict
from ..difflora_core.methods.base import (
    AppliedAdaptation,
    ConceptMethod,
    has_setting,
    with_settings,
)
from ..difflora_core.methods.registry import METHODS, method
from ..difflora_core.storage.adapter_file import read_adaptation
from . import model_paths, sockets
from .host import covariance as host_covariance
from .host.adapters import with_link
from .host.base import ModelLayers
from .host.links import Link
from .host.text import prepare
from .host.words import teach

CATEGORY = "DiffLoRA/concepts"


class BuildCovariance(io.ComfyNode):
    """C of a CLIP, once."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_BuildCovariance",
            display_name="Build Covariance",
            category=CATEGORY,
            description="Learns once for a CLIP how ordinary language uses it, from thousands of "
            "captions made on the spot. Training a concept needs it; it is kept as a file.",
            search_aliases=[*METHODS, "covariance", "C inverse", "concept training"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of the base model you train on."),
                io.Combo.Input(
                    "captions",
                    options=list(host_covariance.CAPTION_WORLDS),
                    default="general",
                    tooltip="general for SDXL; demo for the demo world with its small vocabulary.",
                ),
                io.Int.Input(
                    "count",
                    default=20_000,
                    min=100,
                    max=200_000,
                    tooltip="How many captions. 10 000 are enough for SDXL, 2000 for the demo.",
                ),
                io.String.Input(
                    "file_name",
                    default="sdxl",
                    tooltip="Name of the file in models/difflora_covariance. A file that is there "
                    "and fits this CLIP is read instead of built again.",
                ),
                io.Float.Input(
                    "ridge",
                    default=0.001,
                    min=0.0,
                    max=1.0,
                    step=0.0001,
                    advanced=True,
                    tooltip="Keeps the inverse stable; raise it when it cannot be inverted.",
                ),
                io.Boolean.Input(
                    "rebuild",
                    default=False,
                    advanced=True,
                    tooltip="Build again although the file is there, and replace it.",
                ),
            ],
            outputs=[
                sockets.Covariance.Output(display_name="covariance"),
                io.String.Output(display_name="report", tooltip="Tokens and condition number."),
            ],
        )

    @classmethod
    def execute(cls, clip, captions, count, file_name, ridge, rebuild):
        path = model_paths.new_file(model_paths.COVARIANCES, file_name)
        request = host_covariance.CovarianceRequest(captions, count, ridge, rebuild)
        covariance = host_covariance.covariance_for(clip, path, request)
        report = (
            f"{counted(covariance.tokens, 'token')}, width {covariance.dim}, condition number "
            f"{covariance.condition_number:.2g}"
        )
        return io.NodeOutput(covariance, report, ui=ui.PreviewText(report))


class LoadConcept(io.ComfyNode):
    """A concept file and its word in the CLIP."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_LoadConcept",
            display_name="Load Concept",
            category=CATEGORY,
            description="Loads a trained concept from models/difflora_concepts. Write its word in "
            "the ordinary CLIP Text Encode, connected to this node's CLIP; Apply Concept gives it "
            "its look.",
            search_aliases=[*METHODS, "load embedding", "concept"],
            inputs=[
                io.Combo.Input(
                    "concept_name",
                    options=model_paths.choices(model_paths.concept_files(), "difflora_concepts"),
                    tooltip="A file in models/difflora_concepts; press R after training one.",
                ),
                io.Clip.Input(
                    "clip",
                    tooltip="The CLIP of the base model, or of another Load Concept for several "
                    "words.",
                ),
            ],
            outputs=[
                sockets.Concept.Output(display_name="concept"),
                io.Clip.Output(display_name="clip", tooltip="Knows the new word."),
                io.String.Output(display_name="word", tooltip="What to write in prompts."),
                io.String.Output(display_name="superclass", tooltip="The word of its kind."),
            ],
        )

    @classmethod
    def validate_inputs(cls, concept_name=None):
        return model_paths.problem(model_paths.concept_file, concept_name)

    @classmethod
    def fingerprint_inputs(cls, concept_name=None, clip=None):
        return model_paths.fingerprint(model_paths.concept_file(concept_name))

    @classmethod
    def execute(cls, concept_name, clip):
        adaptation = read_adaptation(model_paths.concept_file(concept_name))
        prepared, clip = prepare(adaptation, clip), teach(clip, adaptation)
        word = adaptation.word
        names = (word.word, word.superclass) if word else ("", "")
        return io.NodeOutput(prepared, clip, *names)


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
            search_aliases=[*METHODS, "key lock", "concept strength"],
            inputs=[
                io.Model.Input("model", tooltip="The model; it stays as it is for other nodes."),
                sockets.Concept.Input("concept", tooltip="From Load Concept or a training node."),
                *_settings(),
                *sockets.span_widgets(),
                *_long_tail(),
                io.Conditioning.Input(
                    "superclass_prompt",
                    optional=True,
                    tooltip="The same prompt with the word of its kind instead of the new word, "
                    "from CLIP Text Encode. Needed by the global lock.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
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
        wanted = {
            "bias": bias,
            "temperature": temperature,
            "lock": lock,
            "combine": combine,
            "reach": reach,
        }
        settings = with_settings(concept.adaptation, wanted)
        prompt = None if superclass_prompt is None else superclass_prompt[0][0]
        applied = AppliedAdaptation(concept, settings, strength, prompt)
        node_id = cls.hidden.unique_id
        link = Link(applied, start_percent, end_percent, positive_only=True, node_id=node_id)
        return io.NodeOutput(with_link(model, link))


def _only(setting: str) -> str:
    """Which methods have a setting."""
    names = [name.title() for name, kind in METHODS.items() if has_setting(kind.Config, setting)]
    return f"({' and '.join(names)} only.)"


def _exportable() -> str:
    """The methods of concepts that have a form as a plain LoRA."""
    kinds = [kind for kind in METHODS.values() if issubclass(kind, ConceptMethod)]
    return " or ".join(kind.name.title() for kind in kinds if kind.exports_lora())


def _settings() -> list[io.Input]:
    """What balances a concept against the prompt."""
    return [
        io.Float.Input(
            "bias",
            default=0.6,
            min=-2.0,
            max=3.0,
            step=0.01,
            tooltip="How like the concept a word must be to get its look. Lower: more "
            f"likeness; higher: more agreement with the prompt. {_only('bias')}",
        ),
        io.Float.Input(
            "temperature",
            default=0.15,
            min=0.01,
            max=10.0,
            step=0.01,
            tooltip=f"Softness of that choice. {_only('temperature')}",
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
            options=["none", "local", "global"],
            default="local",
            tooltip="Where the concept may appear. local: where its kind (cat, hat) would; "
            "global: the whole layout follows the prompt with that word, which must be "
            f"connected as superclass_prompt; none: as the new word likes. {_only('lock')}",
        ),
    ]


def _long_tail() -> list[io.Input]:
    """What is seldom needed."""
    return [
        io.Combo.Input(
            "combine",
            options=["approximate", "exact"],
            default="approximate",
            advanced=True,
            tooltip="Several concepts: exact keeps those apart that resemble each other. "
            f"{_only('combine')}",
        ),
        sockets.reach_widget(
            "How many tokens after its word a concept acts on: -1 all that hear of it, 0 the word "
            "alone. "
            f"{_only('reach')}"
        ),
    ]


class ExportConceptLoRA(io.ComfyNode):
    """A concept as a plain LoRA."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_ExportConceptLoRA",
            display_name="Export Concept as LoRA",
            category=CATEGORY,
            description=f"A {_exportable()} concept as a rank-one LoRA for programs that know no "
            "gate. Without its gate it leaks onto neighbouring words: use it at 0.6 to 0.8. The "
            "word itself is not part of a LoRA; outside of this pack write the word of its kind.",
            search_aliases=[*METHODS, "convert concept", "concept to lora"],
            inputs=[
                io.Model.Input("model", tooltip="The base model that the LoRA is for."),
                sockets.Concept.Input("concept", tooltip="From Load Concept or a training node."),
                io.Boolean.Input(
                    "lock_keys",
                    default=True,
                    advanced=True,
                    tooltip="Also lock the layout to the word of its kind.",
                ),
            ],
            outputs=[io.LoraModel.Output(display_name="lora")],
        )

    @classmethod
    def execute(cls, model, concept, lock_keys):
        with torch.no_grad():
            layers = ModelLayers(model, concept.adaptation)
            weights = method(concept.adaptation.method).as_lora(concept, layers, lock_keys)
        return io.NodeOutput(to_state_dict(weights, "kohya_ldm"))
