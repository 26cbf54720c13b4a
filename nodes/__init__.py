"""The list of nodes."""

from comfy_api.latest import ComfyExtension, io

from . import (
    concepts,
    demo,
    difflora,
    evaluation,
    features,
    infusion,
    latents,
    library,
    loaders,
    lora_tools,
    model_paths,
    perfusion,
    placing,
)

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
    placing.LoRAToHook,
    placing.ApplyLoRA,
    evaluation.CompareIdentities,
    evaluation.CompareGrid,
    concepts.BuildCovariance,
    perfusion.TrainPerfusionConcept,
    infusion.TrainInfusionConcept,
    concepts.LoadConcept,
    perfusion.ApplyConcept,
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
