"""LoRA between ComfyUI and the library: what a socket holds, what fits a model, weight patches."""

from collections.abc import Mapping
from typing import Any

import comfy.hooks
import comfy.lora
import comfy.utils
import comfy.weight_adapter
from torch import Tensor

from ...difflora_core.errors import LayoutError, LoRAFileError
from ...difflora_core.lora.formats.families import split_key
from ...difflora_core.lora.formats.state_dict import from_state_dict, to_state_dict
from ...difflora_core.lora.formats.stems import text_encoder_name
from ...difflora_core.lora.weights import LoRAWeights


def check_lora(lora: Any) -> dict[str, Tensor]:
    """The state dict that came through a LoRA socket, if it is one.

    Raises:
        LoRAFileError: it is empty, or something else.
    """
    if not isinstance(lora, dict) or not all(isinstance(v, Tensor) for v in lora.values()):
        raise LoRAFileError(
            f"A {type(lora).__name__} is not a LoRA. Connect a node that makes one, for example "
            "Personalize."
        )
    if not lora:
        raise LoRAFileError("This LoRA is empty: it changes no layer. Make it again.")
    return lora


def check_lora_fits(model: Any, weights: LoRAWeights, made_for: str) -> None:
    """Compares every layer with the model it is meant for; ComfyUI itself only logs what is lost.

    Raises:
        LayoutError: a layer is missing there, or has another size.
    """
    names: Mapping[str, str] = comfy.lora.model_lora_keys_unet(model.model, {})
    state = model.model.state_dict()
    wrong = []
    for name, layer in weights.layers.items():
        key = names.get(_stem(name))
        there = isinstance(key, str) and key in state
        if not there or not _same_size(state[key], layer.up, layer.down):
            wrong.append(name)
    if wrong:
        raise LayoutError(
            f"This LoRA is made for {made_for}: {len(wrong)} of its {len(weights.layers)} "
            f"layers do not fit the base model that is connected (for example {wrong[0]}). Load "
            "the base model it was made for, or make a LoRA for this one."
        )


def read_lora(state: dict[str, Tensor], model: Any) -> LoRAWeights:
    """Layers, down (r, in) and up (out, r), of a state dict that edit a model's UNet.

    All of them, or none.

    Raises:
        LayoutError: it is for another base model.
        LoRAFileError: part of it is no plain LoRA.
    """
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    weight = ".weight"
    known = {
        diffusers.removesuffix(weight): ldm.removesuffix(weight)
        for diffusers, ldm in names.items()
        if diffusers.endswith(weight)
    }
    found = from_state_dict(state, known)
    if found.report.skipped:
        stem, reason = next(iter(found.report.skipped.items()))
        raise LoRAFileError(
            f"{len(found.report.skipped)} layers of this LoRA are no plain low-rank edits ({stem}: "
            f"{reason}). Use ComfyUI's own nodes for it: Load LoRA Model, or Create Hook LoRA."
        )
    if found.report.unused:
        raise LayoutError(
            f"{len(found.report.unused)} entries of this LoRA belong to no layer of the base model "
            f"that is connected (for example {found.report.unused[0]}). Use a LoRA made for it."
        )
    layers = {name: x for name, x in found.weights.layers.items() if not name.startswith("te")}
    if not layers:
        raise LayoutError("This LoRA edits text encoders only; connect one that edits the model.")
    weights = LoRAWeights(layers)
    check_lora_fits(model, weights, "another base model")
    return weights


def lora_hook(lora: dict[str, Tensor], strength: float) -> comfy.hooks.HookGroup:
    """ComfyUI's hook of a LoRA's state dict; it looks whether that fits when sampling starts."""
    hook = _LoRAHook(strength, 0.0)
    hook.weights = lora
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return group


class _LoRAHook(comfy.hooks.WeightHook):
    """A LoRA hook that is refused where it has no layer, or one of another size."""

    def add_hook_patches(
        self, model: Any, model_options: Any, target_dict: Any, registered: Any
    ) -> Any:
        """As ComfyUI's, which drops what does not fit; what belongs to no layer is logged.

        Raises:
            LayoutError: the LoRA has no layer of this model, or one of another size.
        """
        if target_dict["target"] == comfy.hooks.EnumWeightTarget.Model:
            keys = comfy.lora.model_lora_keys_unet(model.model, {})
            own = {k: t for k, t in self.weights.items() if not _of_text(k)}
            _check_patches(model, comfy.lora.load_lora(own, keys, log_missing=True))
        return super().add_hook_patches(model, model_options, target_dict, registered)


def _check_patches(model: Any, patches: Mapping[Any, Any]) -> None:
    """Raises LayoutError unless there are patches, and all plain ones have the model's sizes."""
    state = model.model.state_dict()
    wrong = [
        key
        for key, patch in patches.items()
        if key in state  # others edit part of a weight
        and _plain(patch)
        and not _same_size(state[key], *patch.weights[:2])
    ]
    if wrong or not patches:
        example = "no layer is its own"
        if wrong:
            up, down = patches[wrong[0]].weights[:2]
            example = f"for example {wrong[0]} is {tuple(state[wrong[0]].shape)}, not "
            example += f"{(len(up), *down.shape[1:])}"
        raise LayoutError(
            f"The LoRA of a hook does not fit the base model that is sampled with ({example}). "
            "Load the base model that it was made for, or make a LoRA for this one."
        )


def _of_text(key: str) -> bool:
    """Whether an entry of a LoRA edits a text encoder."""
    stem, _ = split_key(key) or (key, "")
    return text_encoder_name(stem) is not None


def _plain(patch: Any) -> bool:
    """True for up times down alone: nothing in between (Tucker), no other shape of the weight."""
    adapter = isinstance(patch, comfy.weight_adapter.LoRAAdapter)
    return adapter and patch.weights[3] is None and patch.weights[5] is None


def _same_size(weight: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether up (out, r, ...) times down (r, in, ...) has the size of a weight (out, in, ...)."""
    return up.shape[0] == weight.shape[0] and len(up) * down[0].numel() == weight.numel()


def with_lora(model: Any, weights: LoRAWeights, strength: float) -> Any:
    """A clone of a model with a LoRA as weight patches, as ComfyUI's own loader makes them.

    Raises:
        LayoutError: ComfyUI did not take every layer.
    """
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patched = model.clone()
    patches = comfy.lora.load_lora(to_state_dict(weights), keys)
    taken = set(patched.add_patches(patches, strength))
    lost = [name for name in weights.layers if keys.get(_stem(name)) not in taken]
    if lost:
        raise LayoutError(
            f"ComfyUI did not take {len(lost)} of the {len(weights.layers)} layers of this LoRA "
            f"({', '.join(lost[:3])}{', ...' if lost[3:] else ''}). Load the base model that it "
            "was made for, or make a LoRA for this one."
        )
    return patched


def _stem(name: str) -> str:
    """What ComfyUI calls a layer of the UNet in a LoRA."""
    return f"lora_unet_{name.replace('.', '_')}"
