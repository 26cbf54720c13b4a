"""Around concepts of any method: load a word, build what training needs, export a plain LoRA."""

import torch
from comfy_api.latest import io, ui

from ..difflora_core.lora.formats.state_dict import to_state_dict
from ..difflora_core.methods.perfusion import concept_lora
from ..difflora_core.storage.adapter_file import read_concept
from . import model_paths, sockets
from .host import adapters as concept_host
from .host import text as concept_text
from .host import training as concept_training

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
            search_aliases=["perfusion", "covariance", "C inverse", "concept training"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of the base model you train on."),
                io.Combo.Input(
                    "captions",
                    options=list(concept_training.CAPTION_WORLDS),
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
        request = concept_training.CovarianceRequest(captions, count, ridge, rebuild)
        covariance = concept_training.covariance_for(clip, path, request)
        report = (
            f"{covariance.tokens} tokens, width {covariance.dim}, condition number "
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
            search_aliases=["perfusion", "infusion", "load embedding", "concept"],
            inputs=[
                io.Combo.Input(
                    "concept_name",
                    options=model_paths.concept_files(),
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
    def validate_inputs(cls, concept_name):
        return model_paths.problem(model_paths.concept_file, concept_name)

    @classmethod
    def fingerprint_inputs(cls, concept_name, clip=None):
        return model_paths.fingerprint(model_paths.concept_file(concept_name))

    @classmethod
    def execute(cls, concept_name, clip):
        concept = read_concept(model_paths.concept_file(concept_name))
        prepared, taught = concept_text.prepare(concept, clip), concept_text.teach(clip, concept)
        return io.NodeOutput(prepared, taught, concept.word, concept.superclass)


class ExportConceptLoRA(io.ComfyNode):
    """A concept as a plain LoRA."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_ExportConceptLoRA",
            display_name="Export Concept as LoRA",
            category=CATEGORY,
            description="A Perfusion concept as a rank-one LoRA for programs that know no gate. "
            "Without its gate it leaks onto neighbouring words: use it at 0.6 to 0.8. The word "
            "itself is not part of a LoRA; outside of this pack write the word of its kind.",
            search_aliases=["perfusion", "convert concept", "concept to lora"],
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
            project = concept_host.projector(model, concept.concept)
            weights = concept_lora(concept, project, lock_keys)
        return io.NodeOutput(to_state_dict(weights, "kohya_ldm"))
