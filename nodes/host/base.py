"""ComfyUI's models as a base to train, and what fits on them."""

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.model_sampling
import torch
from torch import Tensor

from ...difflora_core.base_model.protocol import TextCondition
from ...difflora_core.errors import ConfigError, LayoutError
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

TRAINING_BYTES = 4 * 2**30  # activations of a training step; ComfyUI knows the weights


class ModelLayers:
    """The layers of a model's UNet, whatever their storage is (`LiveLayers`).

    Raises:
        LayoutError: the adaptation is for another base model.
    """

    def __init__(self, model: Any, adaptation: TrainedAdaptation) -> None:
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


def check_fits(model: Any, adaptation: TrainedAdaptation) -> None:
    """Compares an adaptation with the UNet it is meant for.

    Raises:
        LayoutError: the UNet lacks some of its layers, or has them in other sizes.
    """
    sizes = method(adaptation.method).layer_sizes(adaptation)
    parts = dict(model.model.diffusion_model.named_modules())
    wrong = [name for name, size in sizes.items() if module_size(parts.get(name)) != size]
    if wrong:
        raise LayoutError(
            f"{adaptation.title} was made for {adaptation.base}: {len(wrong)} of its {len(sizes)} "
            f"layers do not fit the model that is connected (for example {wrong[0]}). Load the "
            "base model it was trained on."
        )


def unet_layout(
    model: Any, base: str, rank: int, targets: tuple[str, ...] = ATTENTION_PROJECTIONS
) -> LoRALayout:
    """The layers of ComfyUI's UNet whose names end so, attention projections unless given."""
    endings = tuple(f".{target}" for target in targets)
    layers = [
        LayerShape(name, size[0], size[1], name)
        for name, part in model.model.diffusion_model.named_modules()
        if name.endswith(endings) and (size := module_size(part))
    ]
    return LoRALayout(base, rank, tuple(layers))


class ComfyBase:
    """ComfyUI's MODEL and VAE as the frozen base of a recipe; weights are only ever read by layers.

    Raises:
        ConfigError: no SDXL, or a model that predicts neither noise nor velocity.
    """

    def __init__(self, model: Any, vae: Any) -> None:
        sampling = model.get_model_object("model_sampling")
        if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) or isinstance(
            sampling, (comfy.model_sampling.EDM, comfy.model_sampling.X0)
        ):
            raise ConfigError("Concepts are trained on SDXL with its own noise schedule.")
        velocity = isinstance(sampling, comfy.model_sampling.V_PREDICTION)
        self.prediction_type = "v_prediction" if velocity else "epsilon"
        self.alphas_cumprod = (1 / (sampling.sigmas.detach().float() ** 2 + 1)).clone()
        self.patcher = model.clone(disable_dynamic=True)
        self.vae, self.unet = vae, self.patcher.model.diffusion_model
        self.dtype = self.patcher.model.get_dtype_inference()
        self.device = self.patcher.load_device
        comfy.model_management.load_models_gpu(
            [self.patcher], memory_required=TRAINING_BYTES, force_full_load=False
        )
        leave_inference(self.unet)

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
        with torch.no_grad():
            latents = torch.cat([self.vae.encode(one[None]) for one in images])
        return self.patcher.model.process_latent_in(latents.float()).clone().cpu()

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (N, H, W, 3) of scaled latents."""
        with torch.no_grad():
            return self.vae.decode(self.patcher.model.process_latent_out(latents)).float()

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextCondition) -> Tensor:
        """The UNet's output (B, C, h, w) for noisy latents of that shape at timesteps (B,).

        It is conditioned on the picture's size as ComfyUI does.
        """
        height, width = (8 * side for side in noisy.shape[-2:])
        sizes = self.patcher.model.encode_adm(pooled_output=text.pooled, width=width, height=height)
        with stopping():
            return self.unet(
                noisy, timesteps.to(noisy.device), context=text.context.to(noisy), y=sizes.to(noisy)
            )
