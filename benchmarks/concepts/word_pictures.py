"""Pictures of new words, and what the judges make of them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor

from difflora_core.adapters.attach import attach
from difflora_core.adapters.base import AdapterSet
from difflora_core.base_model.protocol import TextCondition
from difflora_core.demo.networks.concept_judge import ConceptJudge
from difflora_core.demo.networks.judges import Judges
from difflora_core.demo.world.concepts import DemoConcept
from difflora_core.demo.world.renderer import COLOURS
from difflora_core.demo.world.scenes import ITEM_PHRASES, Scene
from difflora_core.diffusion.sampler import SampleSettings, initial_noise, sample, seeded_generators
from difflora_core.evaluation.metrics import attribute_agreement
from difflora_core.storage.safetensors_io import write_atomic
from difflora_core.text.encoders import EncodedPrompts

from ..prompts import asked
from .methods.base import AdaptersFor, TrainedConcept, Words
from .words import ConceptTrainer

STEPS, GUIDANCE = 10, 2.0
PROTOCOL = 7
"""To be raised with every change of drawing or judging: it makes cached columns invalid."""

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class EvaluationPrompt:
    """One picture of the evaluation: the scene, the concepts in it, and the seed of its noise.

    The scene's own item, if there is one, is a plain thing that stands beside the concepts.
    """

    scene: Scene
    concepts: tuple[DemoConcept, ...]
    seed: int

    def text(self, plain: bool = False) -> str:
        """What the model is given, with the new words or with the plain words of their kinds."""
        named = [(c.kind, c.kind if plain else c.word) for c in self.concepts]
        if self.plain_thing:
            named.append((self.scene.item, self.plain_thing))
        phrases = [ITEM_PHRASES[kind].format(word) for kind, word in named]
        return ", ".join((replace(self.scene, item="none").caption(), *phrases))

    @property
    def plain_thing(self) -> str:
        """Words for the plain thing, none where there is no such thing."""
        scene = self.scene
        return "" if scene.item == "none" else f"{scene.item_colour} {scene.item}"

    @property
    def beside(self) -> DemoConcept:
        """The plain thing, or none, as the judge of concepts names it."""
        colour = COLOURS[self.scene.item_colour]
        return DemoConcept(self.scene.item_colour, self.scene.item, colour, colour)

    @property
    def goals(self) -> dict[str, str]:
        """What its picture has to show but for the looks of the concepts."""
        goals = asked(replace(self.scene, item="none"))
        if len(self.concepts) == 1:  # two are a question of their own
            goals["concept"] = self.concepts[0].kind
        if self.plain_thing:
            goals["beside"] = self.plain_thing
        return goals


def evaluation_prompts(
    concepts: Sequence[DemoConcept], scenes: Sequence[Scene], number: int, seed: int = 0
) -> list[EvaluationPrompt]:
    """One picture of these concepts for each scene; `number` names them among others."""
    start = 10**9 * (seed + 1) + 1000 * number
    return [EvaluationPrompt(scene, tuple(concepts), start + k) for k, scene in enumerate(scenes)]


class ConceptEvaluator:
    """Draws pictures and judges them.

    Args:
        trainer: of the words, with the frozen models.
        judges: of prompts. judge: of concepts.
        cache: folder of columns that were measured before.
    """

    def __init__(
        self, trainer: ConceptTrainer, judges: Judges, judge: ConceptJudge, cache: Path
    ) -> None:
        self.trainer, self.judges, self.judge, self.cache = trainer, judges, judge, cache
        self.models = trainer.models

    def columns(
        self,
        wanted: Sequence[EvaluationPrompt],
        trained: Sequence[TrainedConcept],
        setting: float,
        plain: bool = False,
    ) -> Columns:
        """Every column (N,) of pictures of concepts by one method; cached on disk.

        With `plain` the prompts name the plain words of their kinds, on the model that was taught.
        """
        words = [t.fingerprint for t in trained]
        plan = [(w.text(plain), w.seed) for w in wanted]
        facts = repr((PROTOCOL, STEPS, GUIDANCE, words, setting, plan, self._judges_fingerprint))
        name = hashlib.sha256(facts.encode()).hexdigest()[:32]
        path = self.cache / f"{name}.safetensors"
        if not path.exists():
            changes = trained[0].method.apply(self.models, trained, setting)
            write_atomic(self.judged(self.draw(wanted, *changes, plain), wanted), {}, path)
        return load_file(path)

    @torch.no_grad()
    def draw(
        self,
        wanted: Sequence[EvaluationPrompt],
        words: Words | None = None,
        adapters: AdaptersFor | None = None,
        plain: bool = False,
    ) -> Tensor:
        """Pictures (N, H, W, 3); with `plain`, or no words, by the plain words of their kinds."""
        base, names = self.models.base, self.models.module_names
        text = self._encoded([w.text(plain or words is None) for w in wanted], words or {})
        null = self._encoded([""] * len(wanted), words or {})
        config = base.unet.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = initial_noise(seeded_generators([w.seed for w in wanted]), shape)
        changes = {
            prompts: AdapterSet(()) if adapters is None else adapters(prompts)
            for prompts in (text, null)
        }

        def denoise(z: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
            prompts = text if conditional else null
            with attach(base.unet, changes[prompts], names=names):
                return base.predict(z, timestep, _condition(prompts)).float()

        scheduler = DDIMScheduler.from_config(base.scheduler.config, timestep_spacing="trailing")
        return base.decode_latents(
            sample(denoise, noise, scheduler, SampleSettings(STEPS, GUIDANCE))
        )

    def judged(self, images: Tensor, wanted: Sequence[EvaluationPrompt]) -> Columns:
        """Columns (N,): likeness and recognition averaged over the concepts of a picture."""
        like, known, there = [], [], []
        for number in range(max(len(w.concepts) for w in wanted)):
            rows = [
                self._judged(image, w.concepts[number])
                for image, w in zip(images, wanted, strict=True)
            ]
            for judged, column in zip((like, known, there), zip(*rows, strict=True), strict=True):
                judged.append(torch.cat(column))
        # The judge of prompts knows things in plain colours, and misses real ones in others.
        kinds = [w.concepts[0].kind if t else "" for w, t in zip(wanted, there[0], strict=True)]
        read = {
            **self.judges.attributes(images),
            "concept": kinds,
            "beside": [self._beside(image, w) for image, w in zip(images, wanted, strict=True)],
        }
        recognised = torch.stack(known).float()
        return {
            "concept_similarity": torch.stack(like).mean(0),
            "recognised": recognised.mean(0),
            "all_recognised": recognised.amin(0),
            "prompt_agreement": attribute_agreement(read, [w.goals for w in wanted]),
        }

    def _judged(self, image: Tensor, concept: DemoConcept) -> tuple[Tensor, Tensor, Tensor]:
        return self.judge.judge(image[None], concept)

    def _beside(self, image: Tensor, prompt: EvaluationPrompt) -> str:
        """The plain thing of a prompt if the picture (H, W, 3) shows it, else nothing."""
        if not prompt.plain_thing:
            return ""
        seen = bool(self._judged(image, prompt.beside)[1])
        return prompt.plain_thing if seen else ""

    def step_milliseconds(
        self, trained: Sequence[TrainedConcept], setting: float, rounds: int = 15
    ) -> float:
        """Median extra processor time of a UNet step (batch 2) over the bare base."""
        base = self.models.base
        words, adapters = trained[0].method.apply(self.models, trained, setting)
        prompt = "photo of a person, " + " ".join(t.word for t in trained)
        text = self._encoded([prompt, ""], words)
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(2, base.unet.config.in_channels, 16, 16, generator=generator)
        when = torch.full((2,), 500)

        def seconds(changes: AdapterSet) -> float:
            with attach(base.unet, changes, names=self.models.module_names):
                started = time.process_time()
                base.predict(z, when, _condition(text))
                return time.process_time() - started

        with torch.no_grad():
            own = adapters(text)
            pairs = [(seconds(AdapterSet(())), seconds(own)) for _ in range(rounds + 1)]
        apart = torch.tensor([own - bare for bare, own in pairs[1:]])
        return 1000 * float(apart.median())

    def _encoded(self, prompts: Sequence[str], words: Words) -> EncodedPrompts:
        """Prompts encoded, each different one once."""
        unique = list(dict.fromkeys(prompts))
        with torch.no_grad():
            encoded = self.models.text.encode(unique, words)
        return encoded.select([unique.index(p) for p in prompts])

    @cached_property
    def _judges_fingerprint(self) -> str:
        digest = hashlib.sha256()
        for network in (*self.judges.networks.values(), self.judge.network):
            for tensor in network.state_dict().values():
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def _condition(prompts: EncodedPrompts) -> TextCondition:
    """Prompts as the base model takes them."""
    return TextCondition(prompts.context, prompts.pooled)
