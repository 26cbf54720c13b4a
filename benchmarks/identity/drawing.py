"""Pictures and losses of many people in one UNet batch, every sample under its own LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from difflora_core.adapters.attach import attach
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.base_model.protocol import TextCondition
from difflora_core.config import Config
from difflora_core.demo.world.scenes import Scene
from difflora_core.diffusion.objective import stratified_timesteps
from difflora_core.diffusion.sampler import SampleSettings, initial_noise, sample, seeded_generators
from difflora_core.lora.layout import LoRALayout
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.training.losses import NoisedBatch, denoising_error

from .people import RealPictures


@dataclass(frozen=True)
class Plan(Config):
    """How every row is drawn; one plan for the whole table.

    `scenes`: one prompt each; `repeats`: the first so many prompts get a second seed; `steps` and
    `guidance`: DDIM with trailing timesteps; `batch`: pictures per UNet call; `noises`: noise
    levels per unseen picture; `seed`: of all noise; `half`: bfloat16 products.
    """

    scenes: tuple[Scene, ...]
    repeats: int = 6
    steps: int = 10
    guidance: float = 1.0
    batch: int = 64
    noises: int = 4
    seed: int = 0
    half: bool = True

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(prompt number, seed number) of every picture of a person; first seeds come first."""
        first = [(number, 0) for number in range(len(self.scenes))]
        return first + [(number, 1) for number in range(min(self.repeats, len(self.scenes)))]


class PictureSampler:
    """Draws a fixed set of pictures of fixed people, whatever LoRA they are given.

    Args:
        base: the frozen base model.
        layout: names of the layers.
        plan: what to draw and how.
        seeds: identity seeds; they fix the noise, so a person's pictures do not depend on the
            group.
    """

    def __init__(
        self, base: DiffusersBase, layout: LoRALayout, plan: Plan, seeds: Sequence[int]
    ) -> None:
        self.base, self.plan = base, plan
        self.names = layout.module_names
        self.people = len(seeds)
        self.text = base.encode_prompts([scene.caption() for scene in plan.scenes])
        self.null = base.encode_prompts([""])
        config = base.unet.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        cells = plan.cells
        noise_seeds = [
            plan.seed * 10**12 + seed * 1000 + number * 2 + again
            for seed in seeds
            for number, again in cells
        ]
        self.noise = initial_noise(seeded_generators(noise_seeds), shape)
        self.prompt = torch.tensor([number for number, _ in cells]).repeat(self.people)
        self.owner = torch.arange(self.people).repeat_interleave(len(cells))

    @torch.no_grad()
    def pictures(self, weights: LoRAWeights | None = None, strength: float = 1.0) -> Tensor:
        """Pictures (I, cells, H, W, 3) in [0, 1]; `weights` is a batch of one LoRA per person."""
        parts = []
        for rows in torch.arange(len(self.owner)).split(self.plan.batch):
            with self._with_loras(weights, self.owner[rows], strength):
                parts.append(self._draw(rows))
        return torch.cat(parts).unflatten(0, (self.people, len(self.plan.cells)))

    @torch.no_grad()
    def losses(
        self, unseen: UnseenLatents, weights: LoRAWeights | None = None, strength: float = 1.0
    ) -> Tensor:
        """Mean denoising loss of each person's unseen pictures: (I,)."""
        parts = []
        for rows in torch.arange(len(unseen.owner)).split(self.plan.batch):
            batch = NoisedBatch(
                unseen.latents[rows],
                unseen.noise[rows],
                unseen.timesteps[rows],
                unseen.text.select(unseen.caption[rows]),
            )
            with self._with_loras(weights, unseen.owner[rows], strength), self._precision():
                parts.append(denoising_error(self.base, batch, "uniform"))
        return torch.cat(parts).float().unflatten(0, (self.people, -1)).mean(1)

    def _draw(self, rows: Tensor) -> Tensor:
        """Sample and decode the pictures of these rows."""
        text = self.text.select(self.prompt[rows])
        null = self.null.select(torch.zeros(len(rows), dtype=torch.long))

        def denoise(z: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
            return self.base.predict(z, timestep, text if conditional else null).float()

        settings = SampleSettings(self.plan.steps, self.plan.guidance)
        scheduler = DDIMScheduler.from_config(
            self.base.scheduler.config, timestep_spacing="trailing"
        )
        with self._precision():
            z = sample(denoise, self.noise[rows], scheduler, settings)
            return self.base.decode_latents(z)

    def _with_loras(self, weights: LoRAWeights | None, owner: Tensor, strength: float):
        """The base with each sample's own LoRA attached."""
        if weights is None:
            return nullcontext()
        own = lora_adapter_set(select(weights, owner))
        return attach(self.base.unet, own, strength, self.names)

    def _precision(self) -> torch.autocast:
        """bfloat16 products where the plan says so."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.plan.half)


@dataclass(frozen=True)
class UnseenLatents:
    """Real pictures under fixed noise at stratified noise levels, person by person."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: TextCondition
    caption: Tensor
    owner: Tensor


def unseen_latents(
    base: DiffusersBase, pictures: RealPictures, plan: Plan, seeds: Sequence[int]
) -> UnseenLatents:
    """Prepare the denoising loss: every picture at `plan.noises` noise levels."""
    people, count = pictures.images.shape[:2]
    latents = base.encode_images(pictures.images.flatten(0, 1))
    latents = latents.repeat_interleave(plan.noises, 0)
    captions = [caption for row in pictures.captions for caption in row]
    per_person = count * plan.noises
    steps = len(base.alphas_cumprod)
    noise, timesteps = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(plan.seed * 10**12 + seed + 5 * 10**9)
        noise.append(torch.randn((per_person, *latents.shape[1:]), generator=generator))
        timesteps.append(stratified_timesteps(per_person, generator, steps))
    unique = list(dict.fromkeys(captions))
    return UnseenLatents(
        latents=latents,
        noise=torch.cat(noise),
        timesteps=torch.cat(timesteps),
        text=base.encode_prompts(unique),
        caption=torch.tensor([unique.index(c) for c in captions]).repeat_interleave(plan.noises),
        owner=torch.arange(people).repeat_interleave(per_person),
    )


def select(weights: LoRAWeights, rows: Tensor | Sequence[int]) -> LoRAWeights:
    """LoRAs by number from a batch; repeats are allowed."""
    index = torch.as_tensor(rows)
    return LoRAWeights(
        {
            name: LoRALayer(layer.down[index], layer.up[index], layer.alpha)
            for name, layer in weights.layers.items()
        }
    )


def groups(count: int, size: int) -> Iterator[list[int]]:
    """0 to count - 1 in groups of at most `size`, as even as possible."""
    number = -(-count // size)
    for part in torch.arange(count).tensor_split(max(number, 1)):
        yield part.tolist()
