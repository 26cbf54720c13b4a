"""The list of nodes."""

from comfy_api.latest import ComfyExtension, io

from . import demo, difflora, features, loaders, model_paths

NODES: list[type[io.ComfyNode]] = [
    demo.LoadDemo,
    loaders.LoadModel,
    loaders.LoadFaceAnalysis,
    difflora.Personalize,
    features.ExtractFeatures,
    difflora.MixFeatures,
    difflora.SampleLatent,
    difflora.DecodeLoRA,
]


class DiffLoRAExtension(ComfyExtension):
    """The pack, as ComfyUI sees it."""

    async def on_load(self) -> None:
        """Registers the model folders before any node lists its files."""
        model_paths.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes of the pack."""
        return NODES
