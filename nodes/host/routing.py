"""Watches which style acts where while ComfyUI samples."""

from collections import Counter
from typing import Any

import comfy.patcher_extension
import comfy.sample
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...difflora_core.adapters.routing import watched_routing
from ...difflora_core.evaluation.routing import RoutingTable

KEY = "difflora_routing"
CALL = comfy.patcher_extension.WrappersMP.APPLY_MODEL
POSITIVE = 0
"""ComfyUI's number of the positive prompt, where it samples with two."""


class RoutingWatcher:
    """Fills a table from the calls of a model's network; only the positive prompt counts."""

    def __init__(self) -> None:
        self.table = RoutingTable()

    def on(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of a model that is watched; what is on the model is on it before this."""
        clone = model.clone()
        clone.add_wrapper_with_key(CALL, KEY, self)
        return clone

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        concat: Any,
        cross: Any,
        control: Any,
        options: dict[str, Any],
        **kwargs: Any,
    ) -> Any:
        """One call of the network on x (B, ...) at noise t."""
        prompts = options.get("cond_or_uncond") or [POSITIVE]
        each = len(x) // len(prompts)
        positive = torch.tensor(prompts).repeat_interleave(each) == POSITIVE
        noise, turns = float(t.max()), Counter[str]()

        def see(layer: str, weights: Tensor) -> None:
            turns[layer] += 1
            name = f"file {turns[layer]} {layer}" if turns[layer] > 1 else layer
            self.table.add(name, noise, weights[positive.to(weights.device)])

        with watched_routing(see):
            return executor(x, t, concat, cross, control, options, **kwargs)


def draw(
    model: ModelPatcher,
    positive: Any,
    negative: Any,
    latent: Any,
    seed: int,
    settings: tuple[Any, ...],
) -> dict[str, Any]:
    """What KSampler makes of a latent; settings are steps, cfg, sampler, scheduler and denoise."""
    *course, denoise = settings
    samples = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial")
    )
    made = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
        *course,
        positive,
        negative,
        samples,
        denoise=denoise,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, course[0]),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    rest = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
    return {**rest, "samples": made}
