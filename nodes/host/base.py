"""ComfyUI's models as a base to train, and what fits on them."""

import uuid
from collections.abc import Sequence
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...difflora_core.base_model.protocol import TextCondition
from ...difflora_core.errors import ConfigError, LayoutError, counted
from ...difflora_core.lora.layout import (
    ATTENTION_PROJECTIONS,
    LayerShape,
    LoRALayout,
    module_size,
)
from ...difflora_core.methods.base import TrainedAdaptation
from ...difflora_core.methods.registry import method
from .text import leave_inference, stopping
from .weights import live_weight

DRAWN_SIZE = 1024
"""Side in pixels of the pictures that SDXL was made for; smaller bases say their own."""


class ModelLayers:
    """The layers of a model's UNet, whatever their storage is (`LiveLayers`).

    Raises:
        LayoutError: the adaptation is for another base model.
    """

    def __init__(self, model: ModelPatcher, adaptation: TrainedAdaptation) -> None:
        check_fits(model, adaptation)
        comfy.model_management.load_models_gpu([model])
        self.model = model

    def __call__(self, layer: str, rows: Tensor) -> Tensor:
        """What a layer makes of rows (n, in): (n, out), float32, on the CPU."""
        part = self.model.model.diffusion_model.get_submodule(layer)
        dtype = self.model.model.get_dtype_inference()
        made: Tensor = part(rows.to(self.model.load_device, dtype)).float().cpu()
        return made

    def weight(self, layer: str) -> Tensor:
        """Its weight, float32, on the CPU; without what a LoRA adds to it."""
        return live_weight(self.model, layer).cpu()


def check_fits(model: ModelPatcher, adaptation: TrainedAdaptation) -> None:
    """Compares an adaptation with the UNet it is meant for.

    Raises:
        LayoutError: the UNet lacks some of its layers, or has them in other sizes.
    """
    sizes = method(adaptation.method).layer_sizes(adaptation)
    parts = dict(model.model.diffusion_model.named_modules())
    wrong = [
        name
        for name, size in sizes.items()
        if _linear(module_size(parts.get(name))) != _linear(size)
    ]
    if wrong:
        raise LayoutError(
            f"{adaptation.title} was made for {adaptation.base}: {len(wrong)} of its "
            f"{counted(len(sizes), 'layer')} do not fit the model that is connected (for example "
            f"{wrong[0]}). Load the base model it was trained on."
        )


def _linear(size: tuple[int, ...]) -> tuple[int, ...]:
    """A size without the kernel of a convolution of 1 x 1, which is a linear layer."""
    return size[:2] if size[2:] == (1, 1) else size


def unet_layout(
    model: ModelPatcher, base: str, rank: int, targets: tuple[str, ...] = ATTENTION_PROJECTIONS
) -> LoRALayout:
    """The layers of ComfyUI's UNet with these names or endings of names.

    Attention projections unless given.
    """
    endings = tuple(f".{target}" for target in targets)
    layers = [
        LayerShape(name, size[0], size[1], name)
        for name, part in model.model.diffusion_model.named_modules()
        if f".{name}".endswith(endings) and (size := module_size(part))
    ]
    return LoRALayout(base, rank, tuple(layers))


def picture_size(model: ModelPatcher) -> int:
    """Side in pixels of the square pictures that a model was made for."""
    config = type(model.model.model_config)  # on an instance ComfyUI answers None for any name
    return int(getattr(config, "picture_size", DRAWN_SIZE))


def check_trainable(model: ModelPatcher) -> None:
    """Refuses a model that recipes cannot be trained on.

    Raises:
        ConfigError: no SDXL, its refiner, one for inpainting, or one with another noise schedule.
    """
    sampling = model.get_model_object("model_sampling")
    if isinstance(model.model, comfy.model_base.SDXLRefiner):
        raise ConfigError(
            "This is the refiner of SDXL, which only polishes pictures. Load the base checkpoint: "
            "what is trained on it can be used with the refiner after it."
        )
    if (
        not isinstance(model.model, comfy.model_base.SDXL)
        or not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete)
        or isinstance(sampling, (comfy.model_sampling.EDM, comfy.model_sampling.X0))
    ):
        raise ConfigError(
            f"Training needs SDXL with its own noise schedule, for noise or v-prediction; this is "
            f"{type(model.model).__name__} with {type(sampling).__name__}. Load an SDXL "
            "checkpoint, and connect it before any node that changes its sampling."
        )
    read, drawn = model.model.diffusion_model.in_channels, model.model.latent_format.latent_channels
    if read != drawn:
        raise ConfigError(
            f"This model reads {read} channels where a picture has {drawn}: it is made for "
            "inpainting or editing. Train on the plain checkpoint; the result fits its inpainting "
            "model too."
        )


class ComfyBase:
    """ComfyUI's MODEL and VAE as the frozen base of a recipe; weights are only ever read by layers.

    Pictures are encoded before `load` brings the UNet in, so that both need not fit at once.

    Args:
        model, vae: ComfyUI's.
        apart: give it weights of its own, loaded once more from its file.

    Raises:
        ConfigError: see `check_trainable`.
    """

    def __init__(self, model: ModelPatcher, vae: VAE, apart: bool = False) -> None:
        check_trainable(model)
        sampling = model.get_model_object("model_sampling")
        velocity = isinstance(sampling, comfy.model_sampling.V_PREDICTION)
        self.prediction_type = "v_prediction" if velocity else "epsilon"
        self.alphas_cumprod = (1 / (sampling.sigmas.detach().float() ** 2 + 1)).clone()
        self.patcher = _of_its_own(model) if apart else model.clone(disable_dynamic=True)
        self.vae, self.unet = vae, self.patcher.model.diffusion_model
        self.device, self.needed = self.patcher.load_device, 0.0
        self.beside: tuple[ComfyBase, ...] = ()
        self.dtype = _training_dtype(self.patcher)

    def load(self, needed: float) -> None:
        """Bring the UNet to its device; ComfyUI makes room for it and for the activations.

        Args:
            needed: bytes of activations; ComfyUI knows the weights.
        """
        self.needed = needed
        comfy.model_management.load_models_gpu(
            [base.patcher for base in (self, *self.beside)],
            memory_required=needed,
            force_full_load=False,
        )
        for base in (self, *self.beside):
            leave_inference(base.unet)

    def layout(
        self, base: str, rank: int, targets: tuple[str, ...] = ATTENTION_PROJECTIONS
    ) -> LoRALayout:
        """LoRA layout of the UNet's layers whose names end so."""
        return unet_layout(self.patcher, base, rank, targets)

    def weight(self, path: str) -> Tensor:
        """The weight of a layer before it is patched, float32, where the base computes."""
        return live_weight(self.patcher, path)

    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """Not part of this base: recipes of concepts bring their own text encoders."""
        raise ConfigError("Prompts are encoded by the CLIP that is connected.")

    def encode_images(self, images: Tensor) -> Tensor:
        """Scaled latents of images (N, H, W, 3)."""
        parts = []
        with torch.no_grad():
            for one in images:
                comfy.model_management.throw_exception_if_processing_interrupted()
                parts.append(self.vae.encode(one[None]).float().cpu())
        latents = torch.cat(parts)
        return self.patcher.model.process_latent_in(latents).clone().cpu()

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (N, H, W, 3) of scaled latents; the UNet is there again afterwards."""
        with torch.no_grad():
            images = self.vae.decode(self.patcher.model.process_latent_out(latents)).float()
        self.load(self.needed)
        return images

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextCondition) -> Tensor:
        """The UNet's output (B, C, h, w) for noisy latents of that shape at timesteps (B,).

        It is conditioned on the picture's size as ComfyUI does, or on what `text` says of it.
        """
        sizes = self._size_condition(noisy, text)
        with stopping():
            return self.unet(
                noisy, timesteps.to(noisy.device), context=text.context.to(noisy), y=sizes.to(noisy)
            )

    def _size_condition(self, noisy: Tensor, text: TextCondition) -> Tensor:
        """Pooled prompts and sizes as the UNet takes them (B, P)."""
        encode = self.patcher.model.encode_adm
        if text.time_ids is None:
            height, width = (8 * side for side in noisy.shape[-2:])
            return encode(pooled_output=text.pooled, width=width, height=height)
        names = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
        rows = zip(text.pooled.split(1), text.time_ids.tolist(), strict=True)
        return torch.cat(
            [encode(pooled_output=one, **dict(zip(names, ids, strict=True))) for one, ids in rows]
        )


def _training_dtype(patcher: ModelPatcher) -> torch.dtype:
    """What a patcher's model is trained in: bfloat16 instead of float16 where the device has it.

    In float16 gradients below 6e-8 vanish; a card that lacks bfloat16 gets a scaled loss instead.
    """
    dtype = patcher.model.get_dtype_inference()
    if dtype == torch.float16 and comfy.model_management.should_use_bf16(patcher.load_device):
        dtype = torch.bfloat16
        patcher.set_model_compute_dtype(dtype)
    return dtype


def keep_together(first: ComfyBase, second: ComfyBase) -> None:
    """From now on either brings the other to its device too, in parts where memory is short."""
    first.beside, second.beside = (second,), (first,)


def _of_its_own(model: ModelPatcher) -> Any:
    """A clone of a model that shares no weights with it: its patches are in its weights for good.

    Nobody takes them out again, so ComfyUI need not keep a second copy of what they change.

    Raises:
        ConfigError: its loader does not say where it came from.
    """
    if model.cached_patcher_init is None:
        raise ConfigError(
            "Teacher and student are one model with other patches, and its loader cannot load it "
            "twice. Save one of them as a checkpoint and load that."
        )
    own = model.clone(disable_dynamic=True, force_deepcopy=True)
    for key in own.patches:
        own.patch_weight_to_device(key, own.offload_device)
        own.backup.clear()
    own.patches = {}
    own.patches_uuid = uuid.uuid4()
    return own
