"""Adaptations that are new weights, as patches in ComfyUI's care, and weights as they are stored.

Such a patch costs nothing while sampling and holds where hooks are hard: on offloaded, fp8 and
compiled models, with ComfyUI's own hooks, and in checkpoints that are saved. ComfyUI calls it with
the live weight whenever that is loaded, so it follows the model it is on.
"""

from collections.abc import Sequence
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.weight_adapter
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...difflora_core.errors import LayoutError, counted
from ...difflora_core.methods.base import AppliedAdaptation, WeightEdit
from ...difflora_core.methods.registry import method

KEY = "difflora_weights"
"""Attachment of a model clone: the adaptations that are in its weights, in their order."""


class WeightEditPatch(comfy.weight_adapter.WeightAdapterBase):
    """A WeightEdit as ComfyUI knows patches.

    ComfyUI makes it anew from `loaded_keys` and `weights` to move it, so all it knows is in there.
    """

    name = "difflora_weight_edit"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def of(cls, edit: WeightEdit) -> "WeightEditPatch":
        """The patch of an edit."""
        return cls(set(), (edit.function, tuple(edit.tensors)))

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """weight + strength (edited - weight), computed in float32."""
        del key, strength_model, offset, intermediate_dtype, original_weight
        edit, tensors = self.weights
        fine = weight.to(torch.float32)
        cast = comfy.model_management.cast_to_device
        here = [cast(tensor, weight.device, torch.float32) for tensor in tensors]
        change: Tensor = strength * (edit(fine, *here) - fine)
        weight += function(change.to(weight.dtype))
        return weight


def weights_of(model: ModelPatcher) -> tuple[AppliedAdaptation, ...]:
    """The adaptations that are in a model's weights."""
    return tuple(model.attachments.get(KEY, ()))


def with_weights(model: ModelPatcher, applied: AppliedAdaptation) -> ModelPatcher:
    """A clone of a model whose weights are edited by an adaptation, after those that are there.

    Its patches come before all that only add to a weight: a LoRA stays whole, whether it was loaded
    before or after. Merges, which scale a weight, come first.

    Raises:
        LayoutError: ComfyUI did not take every layer.
    """
    patched = model.clone()
    patched.set_attachments(KEY, (*weights_of(model), applied))
    if applied.strength == 0:
        return patched
    edits = method(applied.adaptation.method).weight_edits(applied) or {}
    patches = {_key(layer): WeightEditPatch.of(edit) for layer, edit in edits.items()}
    taken = patched.add_patches(patches, applied.strength)
    if len(taken) < len(patches):
        lost = sorted(set(patches) - set(taken))
        raise LayoutError(
            f"ComfyUI did not take {len(lost)} of the {counted(len(patches), 'layer')} of "
            f"{applied.adaptation.title} ({lost[0]}). Load the base model it was trained on."
        )
    for key in taken:
        own = patched.patches[key]
        own.insert(_place(own[:-1]), own.pop())
    return patched


def has_additions(model: ModelPatcher) -> bool:
    """Whether something else than our edits and merges is in a model's weights, such as a LoRA."""
    return any(_place(patches) < len(patches) for patches in model.patches.values())


def live_weight(model: ModelPatcher, layer: str) -> Tensor:
    """The weight of a layer of the UNet, float32, where the model computes.

    Of what is on the model it has merges and earlier edits of the whole weight, and no LoRA: it is
    what `with_weights` would edit.
    """
    key = _key(layer)
    weight, _, convert = comfy.model_patcher.get_key_weight(model.model, key)
    if key in model.backup:
        weight = model.backup[key].weight
    fine = comfy.model_management.cast_to_device(
        weight, model.load_device, torch.float32, copy=True
    )
    if convert is not None:
        fine = convert(fine, inplace=True)
    patches = model.patches.get(key, [])
    result: Tensor = comfy.lora.calculate_weight(patches[: _place(patches)], fine, key)
    return result.clone()


def _key(layer: str) -> str:
    """ComfyUI's name of the weight of a layer of the UNet."""
    return f"diffusion_model.{layer}.weight"


def _place(patches: Sequence[Any]) -> int:
    """Behind the last patch that does more than add: one of ours, a merge, a new weight."""
    place = 0
    for number, (_, patch, scale, *_) in enumerate(patches, 1):
        whole = isinstance(patch, tuple) and len(patch) == 2 and patch[0] == "set"
        if scale != 1.0 or whole or isinstance(patch, WeightEditPatch):
            place = number
    return place
