"""Pictures and losses of many people in one UNet batch, every sample under its own LoRA."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from difflora_core.adapters.attach import attach
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.base_model.drawing import draw_latents, trailing_ddim
from difflora_core.base_model.precision import autocast
from difflora_core.base_model.protocol import TextCondition
from difflora_core.config import Config
from difflora_core.demo.world.scenes import Scene
from difflora_core.diffusion.objective import stratified_timesteps
from difflora_core.diffusion.sampler import SampleSettings, initial_noise, seeded_generators
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.training.losses import NoisedBatch, denoising_error

from .people import RealPictures

TIMED_STEPS = 20
"""UNet calls of which the fastest is a step's price."""


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


class Personal(Protocol):
    """What a method that is no LoRA made of some people's photos, one condition per person."""

    def encode(
        self, base: DiffusersBase, captions: Sequence[str], owner: Tensor, strength: float
    ) -> TextCondition:
        """Captions (B) as the person `owner` (B,) of each is drawn with."""
        ...

    def steered(
        self, base: DiffusersBase, owner: Tensor, strength: float
    ) -> AbstractContextManager[DiffusersBase]:
        """The base as it draws the person `owner` (B,) of each sample."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """All that its pictures depend on beside the base."""
        ...

    @property
    def kilobytes(self) -> float:
        """What is kept for one person."""
        ...


Adaptation = LoRAWeights | Personal
"""What draws a person: a batch of one LoRA per person, or a condition of another method."""


class PictureSampler:
    """Draws a fixed set of pictures of fixed people, whatever LoRA they are given.

    Args:
        base: the frozen base model.
        plan: what to draw and how.
        seeds: identity seeds; they fix the noise, so a person's pictures do not depend on the
            group.
    """

    def __init__(self, base: DiffusersBase, plan: Plan, seeds: Sequence[int]) -> None:
        self.base, self.plan = base, plan
        self.names = base.module_names
        self.people = len(seeds)
        self.captions = [scene.caption() for scene in plan.scenes]
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
    def pictures(self, adaptation: Adaptation | None = None, strength: float = 1.0) -> Tensor:
        """Pictures (I, cells, H, W, 3) in [0, 1] of people who each have their own adaptation."""
        parts = []
        for rows in torch.arange(len(self.owner)).split(self.plan.batch):
            captions = [self.captions[number] for number in self.prompt[rows].tolist()]
            text = self._encoded(adaptation, captions, self.owner[rows], strength)
            with self._steered(adaptation, self.owner[rows], strength) as base:
                parts.append(self._draw(base, rows, text))
        return torch.cat(parts).unflatten(0, (self.people, len(self.plan.cells)))

    @torch.no_grad()
    def losses(
        self, unseen: UnseenLatents, adaptation: Adaptation | None = None, strength: float = 1.0
    ) -> Tensor:
        """Mean denoising loss of each person's unseen pictures: (I,)."""
        parts = []
        for rows in torch.arange(len(unseen.owner)).split(self.plan.batch):
            owner, captions = unseen.owner[rows], [unseen.captions[k] for k in rows.tolist()]
            text = self._encoded(adaptation, captions, owner, strength)
            batch = NoisedBatch(
                unseen.latents[rows], unseen.noise[rows], unseen.timesteps[rows], text
            )
            with self._steered(adaptation, owner, strength) as base, self._precision():
                parts.append(denoising_error(base, batch, "uniform"))
        return torch.cat(parts).float().unflatten(0, (self.people, -1)).mean(1)

    @torch.no_grad()
    def step_seconds(self, adaptation: Personal | None = None) -> tuple[float, float]:
        """Of the UNet for one picture, with the adaptation and without, the fastest of several.

        The two take turns, because a machine that does other work is not equally fast all the time.
        """
        owner, z = self.owner[:1], self.noise[:1]
        timestep, fastest = torch.tensor([500.0]), [math.inf, math.inf]
        pair = (adaptation, None)
        texts = [self._encoded(one, self.captions[:1], owner, 1.0) for one in pair]
        for _ in range(TIMED_STEPS):
            for k, one in enumerate(pair):
                with self._steered(one, owner, 1.0) as base, self._precision():
                    started = time.perf_counter()
                    base.predict(z, timestep, texts[k])
                    fastest[k] = min(fastest[k], time.perf_counter() - started)
        return fastest[0], fastest[1]

    def _draw(self, base: DiffusersBase, rows: Tensor, text: TextCondition) -> Tensor:
        """Sample and decode the pictures of these rows."""
        null = self.base.encode_prompts([""] * len(rows))
        settings = SampleSettings(self.plan.steps, self.plan.guidance)
        with self._precision():
            z = draw_latents(base, self.noise[rows], text, null, settings, trailing_ddim(base))
            return self.base.decode_latents(z)

    def _encoded(
        self,
        adaptation: Adaptation | None,
        captions: Sequence[str],
        owner: Tensor,
        strength: float,
    ) -> TextCondition:
        """What each sample's prompt says, in the words of the method."""
        if adaptation is None or isinstance(adaptation, LoRAWeights):
            return self.base.encode_prompts(captions)
        return adaptation.encode(self.base, captions, owner, strength)

    @contextmanager
    def _steered(
        self, adaptation: Adaptation | None, owner: Tensor, strength: float
    ) -> Iterator[DiffusersBase]:
        """The base as it draws each sample's own person."""
        if adaptation is None:
            yield self.base
        elif isinstance(adaptation, LoRAWeights):
            own = lora_adapter_set(select(adaptation, owner))
            with attach(self.base.unet, own, strength, self.names):
                yield self.base
        else:
            with adaptation.steered(self.base, owner, strength) as base:
                yield base

    def _precision(self) -> AbstractContextManager[Any]:
        """bfloat16 products where the plan says so."""
        return autocast(torch.device("cpu"), "bf16" if self.plan.half else "no")


@dataclass(frozen=True)
class UnseenLatents:
    """Real pictures under fixed noise at stratified noise levels, person by person."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: list[str]
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
    return UnseenLatents(
        latents=latents,
        noise=torch.cat(noise),
        timesteps=torch.cat(timesteps),
        captions=[caption for caption in captions for _ in range(plan.noises)],
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
