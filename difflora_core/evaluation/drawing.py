"""Pictures of a protocol, drawn by a base model that wears a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ..adapters.attach import attach
from ..adapters.base import AdapterSet
from ..base_model.diffusers_base import DiffusersBase
from ..base_model.drawing import draw_latents, trailing_ddim
from ..base_model.protocol import TextCondition
from ..diffusion.sampler import SampleSettings, initial_noise, seeded_generators
from ..errors import ConfigError
from .protocol import Protocol


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What a base model is given for a person.

    Attributes:
        adapters: of a LoRA, by module of the UNet; None leaves the base as it is.
        strength: of the LoRA.
        trigger: words that it needs at the beginning of a prompt.
        seconds: that making it took; None where it came from a file.
    """

    adapters: AdapterSet | None = None
    strength: float = 1.0
    trigger: str = ""
    seconds: float | None = None


class ProtocolDrawer:
    """Draws what a protocol asks for; the same seed gives the same noise for every model.

    Args:
        base: the base model; unchanged afterwards.
        protocol: what to draw.

    Raises:
        ConfigError: the base cannot draw pictures of that size.
    """

    def __init__(self, base: DiffusersBase, protocol: Protocol) -> None:
        self.base, self.protocol = base, protocol
        scale = 2 ** (len(base.vae.config.block_out_channels) - 1)
        least = scale * 2 ** (len(base.unet.config.block_out_channels) - 1)
        if protocol.side % least:
            raise ConfigError(
                f"This base draws sides that are multiples of {least} pixels, not {protocol.side}."
            )
        side = protocol.side // scale
        self.shape = (int(base.unet.config.in_channels), side, side)
        self._texts: dict[str, TextCondition] = {}

    @torch.no_grad()
    def draw(self, adaptation: Adaptation, person: str, cells: Sequence[tuple[int, int]]) -> Tensor:
        """Pictures (N, H, W, 3) in [0, 1] of N (prompt, seed), on the CPU.

        Args:
            adaptation: of the person.
            person: name, part of the seed of the noise.
            cells: numbers from 0.
        """
        p = self.protocol
        texts = self._encoded([p.text(prompt, adaptation.trigger) for prompt, _ in cells])
        nothing = self._encoded([p.negative] * len(cells))
        seeds = [p.noise_seed(person, prompt, seed) for prompt, seed in cells]
        noise = initial_noise(seeded_generators(seeds), self.shape)
        worn: Any = nullcontext()
        if adaptation.adapters is not None:
            worn = attach(self.base.unet, adaptation.adapters, adaptation.strength)
        with worn:
            settings = SampleSettings(p.steps, p.guidance)
            z = draw_latents(self.base, noise, texts, nothing, settings, self._scheduler())
        return self.base.decode_latents(z).float().cpu()

    def _encoded(self, prompts: Sequence[str]) -> TextCondition:
        """Prompts, each encoded once."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._texts:
                self._texts[prompt] = self.base.encode_prompts([prompt])
        rows = [self._texts[prompt] for prompt in prompts]
        return TextCondition(
            torch.cat([row.context for row in rows]), torch.cat([row.pooled for row in rows])
        )

    def _scheduler(self) -> Any:
        """A new one: several keep what they did last."""
        if self.protocol.sampler == "ddim":
            return trailing_ddim(self.base)
        return DPMSolverMultistepScheduler.from_config(
            self.base.scheduler.config, algorithm_type="dpmsolver++", use_karras_sigmas=True
        )
