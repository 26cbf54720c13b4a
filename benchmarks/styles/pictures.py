"""Pictures in a learned style, and what the judges make of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from difflora_core.adapters.attach import attach
from difflora_core.adapters.base import AdapterSet
from difflora_core.adapters.routing import watched_routing
from difflora_core.base_model.drawing import draw_latents, trailing_ddim
from difflora_core.base_model.protocol import TextCondition
from difflora_core.config import Config
from difflora_core.demo.world.scenes import Scene
from difflora_core.diffusion.objective import abar_at, add_noise
from difflora_core.diffusion.sampler import SampleSettings, initial_noise, seeded_generators
from difflora_core.evaluation.metrics import attribute_agreement, seed_diversity
from difflora_core.lora.layout import unet_name_map
from difflora_core.methods.registry import method
from difflora_core.storage.safetensors_io import write_atomic
from difflora_core.text.encoders import text_probe
from difflora_core.training.fingerprint import fingerprint, weights_digest
from difflora_core.training.picture_task import PictureTask

from ..prompts import PROMPTS, asked
from .readers import StyleReader
from .routing import routing_columns
from .tasks import StyleTask, style_of
from .trainer import TrainedStyle
from .world import StyleWorld

PROTOCOL = 3
"""To be raised with every change of drawing or judging: it makes cached columns invalid."""
FIRST_SEED = 5 * 10**8
"""Of the pictures' noise."""

BASE, TEACHER = "base", "teacher"
"""The two ends of the table."""
NOBODY = AdapterSet(())

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class DrawingPlan(Config):
    """Which pictures, by DDIM of `steps` under `guidance`.

    `noises`: pictures of every scene; `people`: further ones of every scene, each of a person whom
    DiffLoRA knows.
    """

    scenes: tuple[Scene, ...] = PROMPTS
    noises: int = 2
    people: int = 2
    steps: int = 10
    guidance: float = 2.0

    @property
    def prompts(self) -> list[str]:
        """One for each picture: all noises of the first scene come first."""
        return [scene.caption() for scene in self.scenes for _ in range(self.noises)]

    @property
    def portraits(self) -> list[tuple[str, int]]:
        """Prompt and number of the person of each further picture."""
        return [(s.caption(), k) for s in self.scenes for k in range(self.people)]


class StyleEvaluator:
    """Draws pictures by a plan and judges them; columns of before are read from the cache."""

    def __init__(self, world: StyleWorld, plan: DrawingPlan) -> None:
        self.world, self.plan = world, plan
        unet = world.student.base.unet
        self.names = {ldm: path for path, ldm in unet_name_map(dict(unet.config)).items()}
        self._drawn: dict[tuple[str, bool], Tensor] = {}

    def teacher(self, style: str) -> Columns:
        """Columns (P,) of the teacher itself: nothing can agree with it more."""
        return self._known(style, TEACHER, lambda people: self._taught(style, people))

    def base(self, style: str, given: StyleTask) -> Columns:
        """Columns (P,) of a task's student without any style."""
        student = Drawing(given.task, self.names, given.said)
        return self._known(style, text_probe(given.task.text), self._drawing(student))

    def columns(self, style: str, given: StyleTask, trained: TrainedStyle) -> Columns:
        """Columns (P,) of a style that was learned on a task."""
        student = Drawing(given.task, self.names, given.said, trained)
        return self._known(style, trained.fingerprint, self._drawing(student))

    def _known(self, style: str, who: object, draw: Callable[[bool], Tensor]) -> Columns:
        """Columns (P,) of whom draws pictures (N, H, W, 3), of known people or of anybody."""
        needed = sorted(set(self._styles(style)))
        teachers = [weights_digest(self.world.teachers[each].base.unet) for each in needed]
        name = fingerprint(PROTOCOL, self.plan, style, *teachers, who)[:32]
        path = self.world.cache / "trials" / f"{name}.safetensors"
        if not path.exists():
            write_atomic(self.judged(draw(False), style) | self.faces(draw(True), style), {}, path)
        return load_file(path)

    def _drawing(self, model: Drawing) -> Callable[[bool], Tensor]:
        """Draws the plan's pictures: of known people when True, else of anybody."""

        def draw(people: bool) -> Tensor:
            if not people:
                return model.pictures(self.plan.prompts, self.plan)
            prompts, owners = zip(*self.plan.portraits, strict=True)
            return model.pictures(prompts, self.plan, self.world.people.adapters(owners))

        return draw

    def _taught(self, style: str, people: bool) -> Tensor:
        """Pictures (N, H, W, 3) by the teacher of each prompt's style, drawn once."""
        wanted = self._styles(style, people)
        for each in dict.fromkeys(wanted):
            if (each, people) not in self._drawn:
                teacher = Drawing(self.world.teachers[each], self.names)
                self._drawn[each, people] = self._drawing(teacher)(people)
        return torch.stack([self._drawn[each, people][k] for k, each in enumerate(wanted)])

    def _styles(self, style: str, people: bool = False) -> list[str]:
        """The style in which each picture is wanted."""
        count = self.plan.people if people else self.plan.noises
        return [style_of(style, scene) for scene in self.plan.scenes for _ in range(count)]

    def faces(self, images: Tensor, style: str) -> Columns:
        """`face` (P,): likeness (a mean) of people whose LoRA is on the model too, (N, H, W, 3)."""
        owners = [owner for _, owner in self.plan.portraits]
        photos = self.world.people.photos[torch.tensor(owners)]
        likeness = torch.empty(len(images))
        for reader, index in self._readers(style, people=True):
            likeness[index] = reader.likeness(images[index], photos[index])
        return {"face": likeness.unflatten(0, (-1, self.plan.people)).mean(1)}

    def judged(self, images: Tensor, style: str) -> Columns:
        """What the judges see in pictures (N, H, W, 3): a mean over the noises of each prompt.

        Returns:
            `style_agreement`: how probable the teacher's style is; `prompt_agreement`: share of
            what the prompt names that a reader of this style sees, but for the look, which the
            style overrides; `teacher_distance`: root mean square to the teacher's picture of the
            same prompt and noise; `diversity` of noises.
        """
        plan, judge = self.plan, self.world.judge
        goals = [asked(scene) for scene in plan.scenes for _ in range(plan.noises)]
        for named in goals:
            del named["look"]
        wanted = torch.tensor([judge.styles.index(each) for each in self._styles(style)])
        agreement = torch.empty(len(images))
        for reader, index in self._readers(style):
            read = reader.attributes(images[index])
            agreement[index] = attribute_agreement(read, [goals[k] for k in index.tolist()])
        distance = (images - self._taught(style, False)).square().mean((1, 2, 3)).sqrt()
        each = {
            "style_agreement": judge.probabilities(images).gather(1, wanted[:, None])[:, 0],
            "prompt_agreement": agreement,
            "teacher_distance": distance,
        }
        columns = {name: v.unflatten(0, (-1, plan.noises)).mean(1) for name, v in each.items()}
        if plan.noises > 1:
            columns["diversity"] = seed_diversity(images.unflatten(0, (-1, plan.noises)))
        return columns

    def _readers(self, style: str, people: bool = False) -> Iterator[tuple[StyleReader, Tensor]]:
        """Each reader that is needed, with the numbers of its pictures."""
        wanted = self._styles(style, people)
        for each in dict.fromkeys(wanted):
            index = [k for k, own in enumerate(wanted) if own == each]
            yield self.world.readers[each], torch.tensor(index)

    @torch.no_grad()
    def routing(self, given: StyleTask, trained: TrainedStyle) -> dict[str, float]:
        """`routing_columns` of a task's own pictures under half of all noise."""
        base, parts = given.task.base, (given.examples, given.held_out)
        prompts = [prompts[0] for part in parts for prompts in part.prompts]
        clean = torch.cat([part.latents for part in parts])
        seeds = range(FIRST_SEED, FIRST_SEED + len(clean))
        noise = initial_noise(seeded_generators(seeds), tuple(clean.shape[1:]))
        when = torch.full((len(clean),), len(base.alphas_cumprod) // 2)
        noisy = add_noise(clean, noise, abar_at(base.alphas_cumprod, when, clean))
        encoded, seen = given.task.encode(prompts), list[Tensor]()
        with (
            attach(base.unet, trained.adapters, names=self.names),
            watched_routing(lambda layer, weights: seen.append(weights)),
        ):
            base.predict(noisy, when, TextCondition(encoded.context, encoded.pooled))
        return routing_columns(seen, [given.look(prompt) for prompt in prompts])

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
        pairs = [(seconds(NOBODY), seconds(own)) for _ in range(rounds + 1)]
        return 1000 * float(torch.tensor([with_it - bare for bare, with_it in pairs[1:]]).median())


@dataclass(frozen=True, eq=False)
class Drawing:
    """A model that draws: a base, and a style on it where there is one.

    `names`: layer name to module path; `said`: how the base is told a prompt.
    """

    task: PictureTask
    names: Mapping[str, str]
    said: Callable[[str], str] = str
    style: TrainedStyle | None = None

    @torch.no_grad()
    def pictures(
        self, prompts: Sequence[str], plan: DrawingPlan, people: AdapterSet = NOBODY
    ) -> Tensor:
        """Pictures (N, H, W, 3) of prompts, from noises that depend on their number alone.

        Args:
            prompts: in the words of the teachers.
            plan: how to draw.
            people: adapters of LoRAs.
        """
        base = self.task.base
        encoded = self.task.encode([self.said(prompt) for prompt in prompts])
        text = TextCondition(encoded.context, encoded.pooled)
        nothing = self.task.nothing.select(torch.zeros(len(prompts), dtype=torch.long))
        side, channels = base.unet.config.sample_size, base.unet.config.in_channels
        seeds = range(FIRST_SEED, FIRST_SEED + len(prompts))
        noise = initial_noise(seeded_generators(seeds), (channels, side, side))
        settings = SampleSettings(plan.steps, plan.guidance)
        with attach(base.unet, self._together(people), names=self.names):
            z = draw_latents(base, noise, text, nothing, settings, trailing_ddim(base))
        return base.decode_latents(z)

    def _together(self, people: AdapterSet) -> AdapterSet:
        """LoRAs are in what a style sees, unless it takes something from the base alone."""
        if self.style is None:
            return people
        of_base, own = method(self.style.adaptation.method).of_base, self.style.adapters
        return own + people if of_base else people + own
