"""The list of nodes."""

from importlib import import_module

from comfy_api.latest import ComfyExtension, io

from ..difflora_core.methods.registry import METHODS
from . import (
    concepts,
    demo,
    difflora,
    evaluation,
    features,
    latents,
    library,
    loaders,
    lora_tools,
    model_paths,
)


def method_nodes() -> list[type[io.ComfyNode]]:
    """`NODES` of the file of every method; a method's file has the method's name."""
    modules = [import_module(f".{name}", __package__) for name in METHODS]
    return [node for module in modules for node in module.NODES]


NODES: list[type[io.ComfyNode]] = [
    demo.LoadDemo,
    loaders.LoadModel,
    loaders.LoadFaceAnalysis,
    loaders.LoadLoRAFile,
    difflora.Personalize,
    features.ExtractFeatures,
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
]


class DiffLoRAExtension(ComfyExtension):
    """The pack, as ComfyUI sees it."""

    async def on_load(self) -> None:
        """Registers the model folders, and offers the photos of the workflows."""
        model_paths.register()
        model_paths.offer_photos()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes of the pack."""
        return NODES
