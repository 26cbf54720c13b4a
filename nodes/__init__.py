"""The list of nodes."""

from comfy_api.latest import ComfyExtension, io

from . import model_paths

NODES: list[type[io.ComfyNode]] = []


class DiffLoRAExtension(ComfyExtension):
    """The pack, as ComfyUI sees it."""

    async def on_load(self) -> None:
        """Registers the model folders before any node lists its files."""
        model_paths.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes of the pack."""
        return NODES
