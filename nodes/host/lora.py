"""LoRA between ComfyUI and the library: what a socket holds, what fits a model, weight patches.

ComfyUI's own reader makes the patches, so every family that it loads acts here as there. What it
would drop in silence is renamed, told or refused.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.hooks
import comfy.lora
import comfy.lora_convert
import comfy.utils
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...difflora_core.errors import LayoutError, LoRAFileError, counted, shown
from ...difflora_core.lora.block_groups import GroupStrengths
from ...difflora_core.lora.formats.change import (
    is_constant,
    keys_by_role,
    kind_of,
    scaled_state,
)
from ...difflora_core.lora.formats.families import split_key
from ...difflora_core.lora.formats.known_names import with_known_names
from ...difflora_core.lora.formats.sound import check_sound
from ...difflora_core.lora.formats.stems import other_part, stem_table, why_nothing
from ...difflora_core.lora.layout import module_size
from ...difflora_core.lora.weights import LoRAWeights
from ...difflora_core.methods.base import TrainedAdaptation
from ...difflora_core.methods.lora import LoRA, LoRASettings, layer_tensors
from .patches import fits, layer_of, weight_of


class LicensedLoRA(dict[str, Tensor]):
    """The state dict of a LoRA, and the terms of the weights that made it.

    Args:
        state: as any LoRA socket carries it.
        license: in words; empty where there are no terms.
    """

    def __init__(self, state: Mapping[str, Tensor], license: str) -> None:
        super().__init__(state)
        self.license = license


def license_of(lora: Any) -> str:
    """The terms that a LoRA came with; empty where none are known."""
    return str(getattr(lora, "license", ""))


def check_lora(lora: Any) -> dict[str, Tensor]:
    """The state dict that came through a LoRA socket, if it is one.

    Raises:
        LoRAFileError: it is empty, something else, or broken, see `check_sound`.
    """
    if not isinstance(lora, dict) or not all(isinstance(v, Tensor) for v in lora.values()):
        raise LoRAFileError(
            f"A {type(lora).__name__} is not a LoRA. Connect a node that makes one, for example "
            "Personalize."
        )
    if not lora:
        raise LoRAFileError("This LoRA is empty: it changes no layer. Make it again.")
    check_sound(lora)
    return lora


def check_lora_fits(model: ModelPatcher, weights: LoRAWeights, made_for: str) -> None:
    """Compares every layer with the model it is meant for; ComfyUI itself only logs what is lost.

    Raises:
        LayoutError: a layer is missing there, or has another size.
    """
    state = model.model.state_dict()
    wrong = []
    for name, layer in weights.layers.items():
        weight = state.get(f"diffusion_model.{name}.weight")
        size = (layer.out_features, layer.out_features * layer.in_features)
        if weight is None or (len(weight), weight.numel()) != size:
            wrong.append(name)
    _refuse_misfits(wrong, len(weights.layers), made_for)


def _refuse_misfits(wrong: list[str], count: int, made_for: str) -> None:
    """Raises LayoutError where layers do not fit."""
    if wrong:
        raise LayoutError(
            f"This LoRA is made for {made_for}: {len(wrong)} of its {counted(count, 'layer')} "
            f"{'does' if count == 1 else 'do'} not fit the base model that is connected (for "
            f"example {wrong[0]}). Load the base model it was made for, or make a LoRA for this "
            "one."
        )


@dataclass(frozen=True, eq=False)
class FittingLoRA:
    """A LoRA of any family, as it is for one model.

    Args:
        state: its tensors under names that ComfyUI knows; what does not act on the model is kept.
        patches: ComfyUI's patches of the model's weights.
        layers: stem of a name to the layer of the network that it edits.
        note: what is in it and does not act on the model, in words; empty if nothing is.
    """

    state: dict[str, Tensor]
    patches: Mapping[Any, Any]
    layers: Mapping[str, str]
    note: str

    def on(self, model: ModelPatcher, strength: float, groups: GroupStrengths) -> ModelPatcher:
        """A clone of a model with it as weight patches, as ComfyUI's own loader makes them.

        Raises:
            LoRAFileError: it replaces weights, which a factor cannot do in part.
        """
        patched = model.clone()
        factors = {key: groups.of(layer_of(key)) for key in self.patches}
        for factor in dict.fromkeys(factors.values()):
            if factor == 0 or strength == 0:
                continue
            own = {key: patch for key, patch in self.patches.items() if factors[key] == factor}
            replaced = [key for key, patch in own.items() if _replaces(patch)]
            if replaced and factor != 1:
                raise LoRAFileError(
                    f"This LoRA replaces whole weights (for example {layer_of(replaced[0])}): it "
                    "acts whole or not at all. Set the factors of its parts to 0 or 1."
                )
            patched.add_patches(own, strength * factor)
        return patched

    def scaled(
        self, strength: float, groups: GroupStrengths
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Its tensors with strengths in them, and the stems of layers that cannot hold any."""
        return scaled_state(self.state, self._factor(strength, groups))

    def adaptation(
        self, strength: float, groups: GroupStrengths, model: ModelPatcher
    ) -> TrainedAdaptation | None:
        """It as a record, to act for a part of the steps or prompts; None where nothing is left.

        Raises:
            LoRAFileError: what some of its layers change depends on the weight they are on.
        """
        factor = self._factor(strength, groups)
        groups_of = keys_by_role(self.state)
        acting = {s: layer for s, layer in self.layers.items() if factor(s) != 0}
        parts = {s: {r: self.state[k] for r, k in groups_of[s].items()} for s in acting}
        turning = [stem for stem, own in parts.items() if not is_constant(own)]
        if turning:
            raise LoRAFileError(
                f"This LoRA has {counted(len(turning), 'layer')} of "
                f"{kind_of(parts[turning[0]])} (for example {acting[turning[0]]}): what such "
                "layers change depends on the weight they are on, so they cannot act for a part "
                "of the steps or prompts here. Use LoRA to Hook, with keyframes for a part of the "
                "steps."
            )
        scaled, _ = self.scaled(strength, groups)
        modules = dict(model.model.diffusion_model.named_modules())
        weights = set(model.model.state_dict())
        records = {}
        for stem, keys in keys_by_role(scaled).items():
            layer = acting.get(stem)
            if layer is None:
                continue
            own = {role: scaled[key] for role, key in keys.items()}
            if weight_of(layer, "bias") not in weights:
                own.pop("bias", None)
            record = layer_tensors(own, module_size(modules.get(layer)))
            if record:
                records[layer] = record
        if not records:
            return None
        return TrainedAdaptation(LoRA.name, "another base model", LoRASettings(), {}, records)

    def _factor(self, strength: float, groups: GroupStrengths) -> Callable[[str], float]:
        """Factor of a stem: its layer's; of what is no layer of the model the strength alone."""
        return lambda stem: (
            strength * (groups.of(self.layers[stem]) if stem in self.layers else 1.0)
        )


def _replaces(patch: object) -> bool:
    """Whether a patch of ComfyUI's sets a weight rather than changes it."""
    return isinstance(patch, tuple) and patch[0] == "set"


def read_lora(state: dict[str, Tensor], model: ModelPatcher) -> FittingLoRA:
    """A LoRA for a model, whatever its family.

    Raises:
        LayoutError: it is for another base model, or for no part of this one.
        LoRAFileError: a layer is there twice, or incomplete.
    """
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    own = known_names(state, model, names)
    groups = keys_by_role(own)
    missing = [s for s in groups if s not in names and other_part(s) is None]
    rest = [key for key in own if split_key(key) is None]
    there = {stem: names[stem] for stem in groups if stem in names}
    if missing:
        raise LayoutError(
            f"This LoRA has {counted(len(missing), 'entry')} for no layer of the base model "
            f"that is connected (for example {shown(missing[0])}). Use a LoRA made for it; one "
            "with names of another program may have to be converted first."
        )
    if not there:
        raise LayoutError(_why_nothing(own))
    _refuse_doubled(there)
    patches = _patches(own, names)
    weights = model.model.state_dict()
    _refuse_misfits(_misfits(weights, patches), len(patches), "another base model")
    acting = {key: patch for key, patch in patches.items() if _name(key) in weights}
    used = {layer_of(key) for key in acting}
    layers = {stem: layer_of(key) for stem, key in there.items() if layer_of(key) in used}
    lost = [s for s in there if s not in layers]
    lost += [f"{layer_of(k)} (bias)" for k in patches if k not in acting]
    return FittingLoRA(own, acting, layers, _note(own, rest, lost))


def _refuse_doubled(there: Mapping[str, Any]) -> None:
    """Raises LoRAFileError where two stems are one layer; ComfyUI would take one of them."""
    doubled = [key for key, count in Counter(there.values()).items() if count > 1]
    if doubled:
        raise LoRAFileError(f"Layer {layer_of(doubled[0])} is in this file under two names.")


def whole_note(stems: list[str]) -> str:
    """What to say of layers that cannot hold a strength, in the LoRA that comes out."""
    if not stems:
        return ""
    return (
        f"The LoRA that comes out has {counted(len(stems), 'layer')} at full strength (for example "
        f"{shown(stems[0])}): no file can say another one for this kind."
    )


def _patches(
    state: dict[str, Tensor], names: Mapping[str, Any], log_missing: bool = False
) -> dict[Any, Any]:
    """ComfyUI's patches.

    Raises:
        LoRAFileError: one of several tensors that belong together is missing.
    """
    try:
        converted = comfy.lora_convert.convert_lora(state)
        patches: dict[Any, Any] = comfy.lora.load_lora(converted, names, log_missing)
    except KeyError as error:
        raise LoRAFileError(
            f"This LoRA lacks {shown(str(error))}: it is incomplete or damaged. Download or save "
            "it again."
        ) from error
    return patches


def _why_nothing(state: Mapping[str, Tensor]) -> str:
    """Why no layer of a LoRA acts on a model."""
    return why_nothing(state.keys()) or (
        "No entry of this LoRA belongs to a layer of the base model that is connected (for "
        f"example {shown(next(iter(state)))}). Use a LoRA made for it."
    )


def _note(state: Mapping[str, Tensor], rest: Iterable[str], lost: list[str]) -> str:
    """What does not act on the model, in one sentence."""
    parts = Counter(part for key in state if (part := other_part(key)))
    found = [f"{counted(count, 'entry')} for {part}" for part, count in parts.items()]
    ia3 = any(key.endswith(".on_input") for key in state)
    unknown = [key for key in rest if other_part(key) is None]
    if unknown:
        kind = " of IA3" if ia3 else ""
        count = f"{counted(len(unknown), 'entry')}{kind}"
        found.append(f"{count} that ComfyUI does not read ({shown(unknown[0])})")
    if lost:
        found.append(f"{len(lost)} that the model has no weight for ({shown(lost[0])})")
    return f"Not used on the model: {'; '.join(found)}." if found else ""


def known_names(
    state: dict[str, Tensor], model: ModelPatcher, names: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A LoRA under names that ComfyUI knows for a model; it drops PEFT's names in silence.

    Raises:
        LoRAFileError: a layer is there under two names.
    """
    diffusers = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    weight = ".weight"
    table = stem_table(
        {
            ours.removesuffix(weight): ldm.removesuffix(weight)
            for ours, ldm in diffusers.items()
            if ours.endswith(weight)
        }
    )
    return _unflattened(with_known_names(state, table, names), names, model.model.state_dict())


def _unflattened(
    state: dict[str, Tensor], names: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Differences in the shapes of their weights; ComfyUI leaves out flattened ones."""
    for stem, keys in keys_by_role(state).items():
        name = names.get(stem)
        weight = weights.get(name) if isinstance(name, str) else None
        if weight is None or "diff" not in keys:
            continue
        diff = state[keys["diff"]]
        if (len(diff), diff.numel()) == (len(weight), weight.numel()):
            state[keys["diff"]] = diff.reshape(weight.shape)
    return state


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
        self, model: ModelPatcher, model_options: Any, target_dict: Any, registered: Any
    ) -> Any:
        """As ComfyUI's, which drops what does not fit; what belongs to no layer is logged.

        Raises:
            LayoutError: the LoRA has no layer of this model, or one of another size.
            LoRAFileError: a layer is there under two names.
        """
        if target_dict["target"] != comfy.hooks.EnumWeightTarget.Model:
            return super().add_hook_patches(model, model_options, target_dict, registered)
        given = self.weights  # type: ignore[has-type]
        keys = comfy.lora.model_lora_keys_unet(model.model, {})
        self.weights = known_names(given, model, keys)
        try:
            own = {k: t for k, t in self.weights.items() if other_part(k) is None}
            _refuse_doubled({stem: keys[stem] for stem in keys_by_role(own) if stem in keys})
            patches = _patches(own, keys, log_missing=True)
            wrong = _misfits(model.model.state_dict(), patches)
            if wrong or not patches:
                reason = f"for example {wrong[0]}" if wrong else _why_nothing(self.weights)
                raise LayoutError(
                    "The LoRA of a hook does not fit the base model that is sampled with "
                    f"({reason}). Load the base model that it was made for, or make a LoRA for "
                    "this one."
                )
            return super().add_hook_patches(model, model_options, target_dict, registered)
        finally:
            self.weights = given


def _misfits(weights: Mapping[str, Tensor], patches: Mapping[Any, Any]) -> list[str]:
    """Layers whose patch is made for a weight of another size; ComfyUI would leave them out."""
    wrong = []
    for key, patch in patches.items():
        weight = weights.get(key) if isinstance(key, str) else None  # others edit part of a weight
        if weight is not None and not fits(patch, weight):
            wrong.append(layer_of(key))
    return wrong


def _name(key: Any) -> str:
    """The weight that a patch is for; a key may also say a part of it."""
    name: str = key if isinstance(key, str) else key[0]
    return name
