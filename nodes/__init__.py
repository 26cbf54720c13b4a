"""The list of nodes."""

from importlib import import_module
from importlib.util import find_spec

from comfy_api.latest import ComfyExtension, io

from ..difflora_core.methods.registry import METHODS
from . import (
    concepts,
    demo,
    difflora,
    distillation,
    evaluation,
    features,
    latents,
    library,
    loaders,
    lora_tools,
    model_paths,
    styles,
    train_lora,
)
from .host.widget_values import checked


def method_nodes() -> list[type[io.ComfyNode]]:
    """`NODES` of the file of every method that has one; the file has the method's name."""
    names = [f".{name}" for name in METHODS if find_spec(f".{name}", __package__)]
    return [node for name in names for node in import_module(name, __package__).NODES]


NODES: list[type[io.ComfyNode]] = [
    demo.LoadDemo,
    loaders.LoadModel,
    loaders.LoadFaceAnalysis,
    loaders.LoadLoRAFile,
    difflora.Personalize,
    *train_lora.NODES,
    features.ExtractFeatures,
    features.FindFaces,
    features.SaveFeatures,
    features.LoadFeatures,
    difflora.MixFeatures,
    difflora.SampleLatent,
    difflora.DecodeLoRA,
    latents.BlendIdentities,
    latents.VaryIdentity,
    latents.InventIdentity,
    latents.AddDifference,
    latents.InterpolateIdentities,
    latents.BestOfN,
    latents.SelectIdentity,
    lora_tools.EncodeLoRA,
    lora_tools.SaveLoRA,
    library.AddToLibrary,
    library.ListLibrary,
    library.PickFromLibrary,
    evaluation.CompareIdentities,
    evaluation.CompareGrid,
    concepts.BuildCovariance,
    *method_nodes(),
    concepts.LoadConcept,
    concepts.ApplyConcept,
    concepts.ExportConceptLoRA,
    distillation.DistilCheckpoint,
    styles.LoadStyle,
    styles.ApplyStyle,
    styles.ExportStyleLoRA,
    styles.StyleRouter,
]


class DiffLoRAExtension(ComfyExtension):
    """The pack, as ComfyUI sees it."""

    async def on_load(self) -> None:
        """Registers the model folders, and offers the photos of the workflows."""
        model_paths.register()
        model_paths.offer_photos()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes of the pack."""
        return [checked(node) for node in NODES]
