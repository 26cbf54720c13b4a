"""Between ComfyUI's objects and the library's: models under its memory management.

Nothing here decides anything about DiffLoRA; it hands tensors over and checks that both sides fit.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...difflora_core.diffusion.sampler import MAX_SEED, SampleSettings
from ...difflora_core.errors import ConfigError
from ...difflora_core.lora.formats.state_dict import to_state_dict
from ...difflora_core.models.identity_model import IdentityModel
from ...difflora_core.models.lae.autoencoder import LoRALatent
from ...difflora_core.models.mif import IdentityCondition
from ...difflora_core.storage.identity_models import load_identity_model
from ...difflora_core.vision.face_choice import IMAGE_REGIONS
from ...difflora_core.vision.features import ImageFeatures
from ..sockets import BEST_GUESS, MANUAL
from .browser import show, show_here
from .lora import LicensedLoRA, check_lora_fits

logger = logging.getLogger(__name__)

# Activations only; ComfyUI knows the weights. Covers a full-size model reading 16 photos.
ACTIVATION_BYTES = 512 * 2**20


class _Holder(nn.Module):
    """The module that ComfyUI patches: it sets attributes of its own (device) on it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


@dataclass(frozen=True)
class HostedModel:
    """A DiffLoRA model in ComfyUI's care.

    Attributes:
        patcher: ModelPatcher that holds it; ComfyUI moves its weights.
        name: Name of the file or folder, for messages.
    """

    patcher: ModelPatcher = field(repr=False)
    name: str

    @property
    def settings(self) -> IdentityModel:
        """The network, to read its configuration; it may be anywhere."""
        return self.patcher.model.network

    def ready(self) -> IdentityModel:
        """The network on the device where it computes."""
        comfy.model_management.load_models_gpu([self.patcher], memory_required=ACTIVATION_BYTES)
        network = self.settings
        for name, buffer in list(network.named_buffers(recurse=False)):
            # A partly loaded model leaves them behind, and they say where inputs go.
            setattr(network, name, buffer.to(self.patcher.load_device))
        return network


def host_model(path: str, name: str) -> HostedModel:
    """Loads a model into ComfyUI's care; strict, see storage.identity_models."""
    casting = comfy.ops.manual_cast
    network = load_identity_model(path, casting, as_stored=True).requires_grad_(False)
    patcher = comfy.model_patcher.CoreModelPatcher(
        _Holder(network),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return HostedModel(patcher, name)


def image_region(hosted: HostedModel, asked: str) -> str:
    """What CLIP vision is to see: as the model was trained, unless something else is asked for."""
    return hosted.settings.image_region if asked == IMAGE_REGIONS[0] else asked


def gate_override(
    gate: str, face_share: float, face_weight: float = -1.0, image_weight: float = -1.0
) -> Tensor:
    """Weights (2,) of face and image; NaN keeps the learned one. A weight below 0 is not set."""
    shares = (face_share, 1.0 - face_share) if gate == MANUAL else (torch.nan, torch.nan)
    asked = (face_weight, image_weight)
    return torch.tensor([w if w >= 0 else s for w, s in zip(asked, shares, strict=True)])


def mix(hosted: HostedModel, features: ImageFeatures, override: Tensor) -> IdentityCondition:
    """Photos of one person to a condition; `override` (2,) is a `gate_override`."""
    network = hosted.ready()
    told = network.other_recogniser(features)
    if told:
        logger.warning("%s", told)
        show_here(told)
    return network.condition(network.complete(features), override.to(network.device))


def draw_latent(
    hosted: HostedModel,
    condition: IdentityCondition | None,
    mode: str,
    seed: int,
    settings: SampleSettings,
) -> LoRALatent:
    """The best guess, or a sample with progress and interruption; no condition invents a person.

    Raises:
        ConfigError: a best guess without a condition.
    """
    network = hosted.ready()
    if mode == BEST_GUESS and condition is None:
        raise ConfigError(
            "A best guess needs photos: connect a condition, or set the mode to sampled to invent "
            "a person."
        )
    if condition is not None:
        condition = condition.to(network.anchor)
    if mode == BEST_GUESS and condition is not None:
        return network.mean_latent(condition)
    return network.sample_latent(condition, [seed], settings, callback=progress(settings.steps))


def sample_batch(
    hosted: HostedModel,
    condition: IdentityCondition | None,
    seeds: range,
    settings: SampleSettings,
    initial: LoRALatent | None = None,
) -> LoRALatent:
    """One sample for every seed, see IdentityModel.sample_latent; seeds go round at the last."""
    network = hosted.ready()
    if condition is not None:
        condition = condition.to(network.anchor)
    numbers = [seed % (MAX_SEED + 1) for seed in seeds]
    bar = progress(settings.steps)
    return network.sample_latent(condition, numbers, settings, callback=bar, initial=initial)


def progress(total: int) -> Any:
    """A step callback that moves ComfyUI's progress bar and stops when the user asks."""
    bar = comfy.utils.ProgressBar(total)

    def step(done: int, total: int, *_: Tensor) -> None:
        bar.update_absolute(done, total)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return step


def show_text(node: Any, text: str) -> None:
    """Shows a line on the running node in the browser, as core's Get Image Size does."""
    show(node.hidden.unique_id, text)


def decode(hosted: HostedModel, latent: LoRALatent, base_model: Any) -> LicensedLoRA:
    """A latent (1, K, Dz) to a LORA_MODEL: a LicensedLoRA with kohya LDM keys and alpha.

    Raises:
        LayoutError: a base is given, and the LoRA does not fit it.
    """
    weights = hosted.ready().decode(latent).batch_item(0).to(device="cpu")
    if base_model is not None:
        check_lora_fits(base_model, weights, hosted.settings.layout.base)
    return LicensedLoRA(to_state_dict(weights, "kohya_ldm"), latent.license)
