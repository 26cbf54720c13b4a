"""A later version of the pack in which a node got another id: what it registers then."""

from comfy_api.latest import ComfyAPI, ComfyExtension, io

RENAMED = io.NodeReplace(
    new_node_id="DiffLoRA_MixFeatures",
    old_node_id="DiffLoRA_WeighFeatures",
    old_widget_ids=["gate", "share", "face_weight", "image_weight"],
    input_mapping=[
        {"new_id": "difflora_model", "old_id": "model"},
        {"new_id": "features", "old_id": "features"},
        {"new_id": "gate", "old_id": "gate"},
        {"new_id": "face_share", "old_id": "share"},
        {"new_id": "face_weight", "set_value": -1.0},
        {"new_id": "image_weight", "set_value": -1.0},
    ],
    output_mapping=[{"new_idx": 1, "old_idx": 0}, {"new_idx": 0, "old_idx": 1}],
)


class Renaming(ComfyExtension):
    """No node of its own."""

    async def on_load(self) -> None:
        """Registers the replacement."""
        await ComfyAPI().node_replacement.register(RENAMED)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """None."""
        return []


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI calls."""
    return Renaming()
