"""Pictures in a learned style, and what the judges make of them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor

from difflora_core.adapters.attach import attach
from difflora_core.adapters.base import AdapterSet
from difflora_core.base_model.protocol import TextCondition
from difflora_core.config import Config
from difflora_core.demo.world.scenes import Scene
from difflora_core.diffusion.sampler import SampleSettings, initial_noise, sample, seeded_generators
from difflora_core.evaluation.metrics import attribute_agreement, seed_diversity
from difflora_core.lora.layout import unet_name_map
from difflora_core.storage.safetensors_io import write_atomic
from difflora_core.training.concept_task import PictureTask
from difflora_core.training.fingerprint import weights_digest

from ..prompts import PROMPTS, asked
from .tasks import StyleTask
from .trainer import TrainedStyle
from .world import StyleWorld

PROTOCOL = 1
"""To be raised with every change of drawing or judging: it makes cached columns invalid."""
FIRST_SEED = 5 * 10**8
"""Of the pictures' noise."""

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class DrawingPlan(Config):
    """Which pictures: every scene in so many noises, by DDIM of `steps` under `guidance`."""

    scenes: tuple[Scene, ...] = PROMPTS
    noises: int = 2
    steps: int = 10
    guidance: float = 2.0

    @property
    def prompts(self) -> list[str]:
        """One for each picture: all noises of the first scene come first."""
        return [scene.caption() for scene in self.scenes for _ in range(self.noises)]


class StyleEvaluator:
    """Draws pictures by a plan and judges them; columns of before are read from the cache."""

    def __init__(self, world: StyleWorld, plan: DrawingPlan) -> None:
        self.world, self.plan = world, plan
        unet = world.student.base.unet
        self.names = {ldm: path for path, ldm in unet_name_map(dict(unet.config)).items()}
        self._wanted: dict[str, Tensor] = {}

    def wanted(self, style: str) -> Tensor:
        """The teacher's pictures (N, H, W, 3), drawn once."""
        if style not in self._wanted:
            self._wanted[style] = draw(self.world.teachers[style], self.plan)
        return self._wanted[style]

    def teacher(self, style: str) -> Columns:
        """Columns (P,) of the teacher itself: nothing can agree with it more."""
        return self.judged(self.wanted(style), style)

    def base(self, style: str, given: StyleTask) -> Columns:
        """Columns (P,) of a task's student without any style."""
        return self.judged(draw(given.task, self.plan, said=given.said), style)

    def columns(self, style: str, given: StyleTask, trained: TrainedStyle) -> Columns:
        """Columns (P,) of a style that was learned on a task."""
        teacher = weights_digest(self.world.teachers[style].base.unet)
        facts = repr((PROTOCOL, self.plan, style, teacher, trained.fingerprint))
        name = hashlib.sha256(facts.encode()).hexdigest()[:32]
        path = self.world.cache / "trials" / f"{name}.safetensors"
        if not path.exists():
            images = draw(given.task, self.plan, trained.adapters, self.names, given.said)
            write_atomic(self.judged(images, style), {}, path)
        return load_file(path)

    def judged(self, images: Tensor, style: str) -> Columns:
        """What the judges see in pictures (N, H, W, 3): a mean over the noises of each prompt.

        Returns:
            `style_agreement`: how probable the teacher's style is; `teacher_distance`: root mean
            square to its picture of the same prompt and noise; `prompt_agreement`: share of what
            the prompt names, but for the look, which the style overrides; `diversity` of noises.
        """
        plan, judge = self.plan, self.world.judge
        goals = [asked(scene) for scene in plan.scenes for _ in range(plan.noises)]
        for named in goals:
            del named["look"]
        each = {
            "style_agreement": judge.probabilities(images)[:, judge.styles.index(style)],
            "teacher_distance": (images - self.wanted(style)).square().mean((1, 2, 3)).sqrt(),
            "prompt_agreement": attribute_agreement(self.world.prompts.attributes(images), goals),
        }
        columns = {name: v.unflatten(0, (-1, plan.noises)).mean(1) for name, v in each.items()}
        if plan.noises > 1:
            columns["diversity"] = seed_diversity(images.unflatten(0, (-1, plan.noises)))
        return columns

    @torch.no_grad()
    def step_milliseconds(self, trained: TrainedStyle, rounds: int) -> float:
        """Median extra processor time of a UNet step (batch 2) over the bare base."""
        task = self.world.student
        base, encoded = task.base, task.encode(self.plan.prompts[:1] * 2)
        text = TextCondition(encoded.context, encoded.pooled)
        side, channels = base.unet.config.sample_size, base.unet.config.in_channels
        z = initial_noise(seeded_generators(range(2)), (channels, side, side))
        when = torch.full((2,), 500)

        def seconds(changes: AdapterSet) -> float:
            with attach(base.unet, changes, names=self.names):
                started = time.process_time()
                base.predict(z, when, text)
                return time.process_time() - started

        own = trained.adapters
        pairs = [(seconds(AdapterSet(())), seconds(own)) for _ in range(rounds + 1)]
        return 1000 * float(torch.tensor([with_it - bare for bare, with_it in pairs[1:]]).median())


@torch.no_grad()
def draw(
    task: PictureTask,
    plan: DrawingPlan,
    adapters: AdapterSet | None = None,
    names: dict[str, str] | None = None,
    said: Callable[[str], str] = str,
) -> Tensor:
    """Pictures (N, H, W, 3) of a plan's prompts, by noises that depend on the plan alone.

    Args:
        task: the base model and its text encoders.
        plan: what to draw.
        adapters: to put on the base.
        names: layer name to module path.
        said: how the base is told a prompt.
    """
    base, prompts = task.base, [said(prompt) for prompt in plan.prompts]
    encoded = task.encode(prompts)
    text = TextCondition(encoded.context, encoded.pooled)
    nothing = task.nothing.select(torch.zeros(len(prompts), dtype=torch.long))
    side, channels = base.unet.config.sample_size, base.unet.config.in_channels
    seeds = range(FIRST_SEED, FIRST_SEED + len(prompts))
    noise = initial_noise(seeded_generators(seeds), (channels, side, side))

    def denoise(z: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
        return base.predict(z, timestep, text if conditional else nothing).float()

    scheduler = DDIMScheduler.from_config(base.scheduler.config, timestep_spacing="trailing")
    with nullcontext() if adapters is None else attach(base.unet, adapters, names=names):
        z = sample(denoise, noise, scheduler, SampleSettings(plan.steps, plan.guidance))
    return base.decode_latents(z)
