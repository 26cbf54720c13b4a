"""Concepts on ComfyUI's models: adapters on its UNet, and its models as a base to train.

Nothing is kept on a shared network between two calls: adapters are hooked on for one call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import torch
from torch import Tensor

from ...difflora_core.adapters.attach import attach
from ...difflora_core.adapters.base import AdapterSet
from ...difflora_core.base_model.protocol import TextCondition
from ...difflora_core.errors import ConfigError, LayoutError
from ...difflora_core.lora.layout import ATTENTION_PROJECTIONS, LayerShape, LoRALayout
from ...difflora_core.methods.base import AdaptationRequest
from ...difflora_core.methods.infusion import Infusion, InfusionConfig
from ...difflora_core.methods.perfusion import Perfusion, PerfusionConfig, PreparedConcept
from ...difflora_core.text.new_words import Concept
from .text import leave_inference, stopping

TRAINING_BYTES = 4 * 2**30  # activations of a training step; ComfyUI knows the weights
WRAPPER = "difflora_concepts"


@dataclass(frozen=True, eq=False)
class AppliedConcept:
    """A concept on a model: its knobs, when it acts, and the super-class prompt (1, L, d)."""

    prepared: PreparedConcept
    config: PerfusionConfig | InfusionConfig
    start: float = 0.0
    end: float = 1.0
    superclass_prompt: Tensor | None = field(default=None, repr=False)


class ConceptStack:
    """The concepts of one model clone; puts the adapters of those that act on for every call."""

    def __init__(self, concepts: Sequence[AppliedConcept], exact: bool) -> None:
        self.concepts, self.exact = tuple(concepts), exact
        self._built: dict[Any, tuple[AdapterSet, list[Any]]] = {}

    def __call__(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One call of the network on x (B, ...) at noise t; ComfyUI's options come last."""
        base, options = executor.class_obj, args[-1]
        percent, sigma = base.model_sampling.percent_to_sigma, float(t.max())
        active = tuple(
            k for k, c in enumerate(self.concepts) if percent(c.end) <= sigma <= percent(c.start)
        )
        chunks = options.get("cond_or_uncond") or [0]
        if not active or 0 not in chunks:
            return executor(x, t, *args, **kwargs)
        adapters, switches = self.adapters(active, x.device)
        rows = None
        if any(chunks):
            rows = torch.tensor([float(c == 0) for c in chunks], device=x.device)
            rows = rows.repeat_interleave(len(x) // len(chunks))
        for switch in switches:
            switch.select_rows(rows)
        with attach(base.diffusion_model, adapters):
            return executor(x, t, *args, **kwargs)

    def adapters(self, active: tuple[int, ...], device: Any) -> tuple[AdapterSet, list[Any]]:
        """Adapters of the concepts that act, on a device, and what takes the rows of a batch."""
        key = (active, str(device))
        if key not in self._built:
            self._built[key] = self._build([self.concepts[k] for k in active], device)
        return self._built[key]

    def _build(
        self, concepts: Sequence[AppliedConcept], device: Any
    ) -> tuple[AdapterSet, list[Any]]:
        request, entries = AdaptationRequest(), AdapterSet(())
        moved = [
            (PreparedConcept(c.prepared.concept.to(device), c.prepared.superclass.to(device)), c)
            for c in concepts
        ]
        gated = [(p, c.config) for p, c in moved if isinstance(c.config, PerfusionConfig)]
        plain = [(p.concept, c.config) for p, c in moved if isinstance(c.config, InfusionConfig)]
        prompts = [c.superclass_prompt for c in concepts if c.superclass_prompt is not None]
        if gated:
            context = prompts[-1].to(device) if prompts else None
            entries += Perfusion(gated, self.exact, context).adapters(request)
        if plain:
            entries += Infusion(plain).adapters(request)
        switches = {id(s): s for e in entries if (s := getattr(e.adapter, "matcher", e.adapter))}
        return entries, list(switches.values())


def apply_concept(model: Any, applied: AppliedConcept, exact: bool) -> Any:
    """A clone of a model with one concept more.

    Raises:
        ConfigError, LayoutError: it cannot be on this model, or not beside the concepts there.
    """
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    before = [s for s in model.get_wrappers(kind, WRAPPER) if isinstance(s, ConceptStack)]
    concepts = [c for stack in before for c in stack.concepts]
    words = [c.prepared.concept.word for c in concepts]
    if applied.prepared.concept.word in words:
        raise ConfigError(f"The concept {applied.prepared.concept.word} is on this model already.")
    stack = ConceptStack([*concepts, applied], exact or any(s.exact for s in before))
    stack.adapters(tuple(range(len(stack.concepts))), torch.device("cpu"))  # refuse early
    check_fits(model, applied.prepared.concept)
    clone = model.clone()
    clone.remove_wrappers_with_key(kind, WRAPPER)
    clone.add_wrapper_with_key(kind, WRAPPER, stack)
    return clone


def applied(
    prepared: PreparedConcept,
    config: PerfusionConfig,
    times: tuple[float, float],
    superclass_prompt: Tensor | None,
) -> AppliedConcept:
    """A concept with the knobs that its method has.

    Raises:
        ConfigError: it would end before it starts.
    """
    if times[0] > times[1]:
        raise ConfigError(f"The concept ends at {times[1]:.0%}, before it starts ({times[0]:.0%}).")
    if prepared.concept.method == Infusion.name:
        return AppliedConcept(prepared, InfusionConfig(config.strength), *times)
    return AppliedConcept(prepared, config, *times, superclass_prompt)


def projector(model: Any, concept: Concept) -> Callable[[str, Tensor], Tensor]:
    """What the layers of a loaded model make of encodings (n, in), whatever their storage is.

    Raises:
        LayoutError: the concept is for another model.
    """
    check_fits(model, concept)
    comfy.model_management.load_models_gpu([model])
    unet, dtype = model.model.diffusion_model, model.model.get_dtype_inference()

    def project(layer: str, rows: Tensor) -> Tensor:
        part = unet.get_submodule(layer)
        return part(rows.to(model.load_device, dtype)).float().cpu()

    return project


def check_fits(model: Any, concept: Concept) -> None:
    """Compares a concept with the UNet it is meant for.

    Raises:
        LayoutError: the UNet has other cross-attention layers.
    """
    found = {s.name: s for s in unet_layout(model, "", 1) if s.name.endswith("attn2.to_v")}
    wrong = [
        name
        for name, value in concept.values.items()
        if name not in found or found[name].out_features != len(value)
    ]
    width = next((s.in_features for s in found.values()), 0)
    if wrong or len(found) != len(concept.values) or width != len(concept.direction):
        raise LayoutError(
            f"The concept {concept.word} was made for {concept.base}, with "
            f"{len(concept.values)} cross-attention layers; the model has {len(found)}, and "
            f"{len(wrong)} do not fit. Load the base model it was trained on."
        )


def unet_layout(model: Any, base: str, rank: int) -> LoRALayout:
    """The attention projections of ComfyUI's UNet."""
    endings = tuple(f".{target}" for target in ATTENTION_PROJECTIONS)
    layers = [
        LayerShape(name, part.in_features, part.out_features, name)
        for name, part in model.model.diffusion_model.named_modules()
        if name.endswith(endings)
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

    def layout(self, base: str, rank: int) -> LoRALayout:
        """The UNet's attention projections."""
        return unet_layout(self.patcher, base, rank)

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
        """The UNet's output, conditioned on the picture's size as ComfyUI does."""
        height, width = (8 * side for side in noisy.shape[-2:])
        sizes = self.patcher.model.encode_adm(pooled_output=text.pooled, width=width, height=height)
        with stopping():
            return self.unet(
                noisy, timesteps.to(noisy.device), context=text.context.to(noisy), y=sizes.to(noisy)
            )
