"""Words taught by every method, kept on disk, and worn at any setting of their knob."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from difflora_core.adapters.base import AdapterSet
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.demo.build.concept_training import TRAINING, concept_lesson, wordings
from difflora_core.demo.world.concepts import ConceptPictures, DemoConcept, render_concept
from difflora_core.demo.world.identities import split_seeds
from difflora_core.lora.formats.state_dict import from_state_dict, to_state_dict
from difflora_core.lora.weights import LoRAWeights
from difflora_core.methods.base import AdaptationRequest
from difflora_core.methods.infusion import Infusion, InfusionConfig
from difflora_core.methods.perfusion import Perfusion, PerfusionConfig, PreparedConcept
from difflora_core.storage.adapter_file import read_concept, write_concept
from difflora_core.storage.safetensors_io import write_atomic
from difflora_core.text.covariance import Covariance
from difflora_core.text.new_words import (
    Concept,
    ConceptText,
    WordEmbedding,
    superclass_token,
    word_encoding,
)
from difflora_core.training.adaptation_run import run_adaptation
from difflora_core.training.concept_task import ConceptExamples, ConceptTask
from difflora_core.training.infusion import InfusionObjective, InfusionTraining
from difflora_core.training.perfusion import PerfusionObjective

from .word_objectives import InversionObjective, LoRAObjective, YardstickConfig

PERFUSION, INFUSION = "Perfusion", "Infusion"
DREAMBOOTH, INVERSION = "DreamBooth LoRA", "Textual Inversion"
METHODS = (PERFUSION, INFUSION, DREAMBOOTH, INVERSION)
PHOTOS = 4
VERSION = 4
"""To be raised with every change of a recipe: it makes kept words invalid."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipes:
    """How long and how fast; the same steps, pictures and seeds for all."""

    steps: int = 400
    batch: int = 4
    seed: int = 0
    rates: Mapping[str, tuple[float, ...]] | None = None

    def with_rates(self, method: str, rates: tuple[float, ...]) -> Recipes:
        """The same with other rates for one method."""
        return replace(self, rates={**(self.rates or {}), method: rates})

    def config(self, method: str) -> Any:
        """Settings of one method's recipe."""
        rates = {**RATES, **(self.rates or {})}[method]
        every = max(1, self.steps // 8)
        common = {"steps": self.steps, "batch": self.batch, "seed": self.seed}
        common["evaluate_every"] = every
        if method == PERFUSION:
            return replace(TRAINING, value_rate=rates[0], word_rate=rates[1], **common)
        if method == INFUSION:
            return InfusionTraining(learning_rate=rates[0], **common)
        return YardstickConfig(rate=rates[0], **common)


RATES: Mapping[str, tuple[float, ...]] = {
    PERFUSION: (TRAINING.value_rate, TRAINING.word_rate),
    INFUSION: (0.3,),
    DREAMBOOTH: (0.003,),
    INVERSION: (0.01,),
}
"""Learning rates: the best of a few on validation concepts; `choose_rates` looks at
them side by side."""
OBJECTIVES: Mapping[str, Callable[..., Any]] = {
    PERFUSION: PerfusionObjective,
    INFUSION: InfusionObjective,
    DREAMBOOTH: LoRAObjective,
    INVERSION: InversionObjective,
}


@dataclass(frozen=True, eq=False)
class Taught:
    """A word by one method: `trained` is a Concept, LoRAWeights or an embedding."""

    method: str
    concept: DemoConcept
    trained: Any
    seconds: float
    size: int
    mark: str


@dataclass(frozen=True)
class School:
    """Teaches words on one base; what was taught is kept in `folder`.

    `base_hash`: of the base's file; `say`: prints a line.
    """

    base: DiffusersBase
    text: ConceptText
    covariance: Covariance
    base_hash: str
    folder: Path
    say: Say = lambda line: None

    def teach(self, concept: DemoConcept, method: str, recipes: Recipes) -> Taught:
        """One word by one method, from the cache where possible."""
        photos = training_photos(concept)
        config = recipes.config(method)
        mark = self._mark(concept, method, config, photos)
        path = self.folder / f"{mark}.safetensors"
        if not path.exists():
            started = time.process_time()
            task, examples = self.lesson(concept, photos)
            objective = OBJECTIVES[method](task, config)
            run = self.folder / f"{mark}.run"
            result = run_adaptation(objective, examples, config.batch, config.loop, run)
            seconds = time.process_time() - started
            self._write(path, method, result.concepts[0], seconds)
            shutil.rmtree(run)
            self.say(f"{method} learned {concept.word} in {seconds:.0f} s (step {result.step})")
        trained, seconds = self._read(path, method)
        return Taught(method, concept, trained, seconds, path.stat().st_size, mark)

    def lesson(
        self, concept: DemoConcept, photos: ConceptPictures
    ) -> tuple[ConceptTask, ConceptExamples]:
        """The task and its pictures."""
        return concept_lesson(self.base, self.text, self.covariance, concept, photos)

    @cached_property
    def names(self) -> dict[str, str]:
        """Layer name to module path."""
        return self.base.layout("demo", 1).module_names

    def kind_embedding(self, concept: DemoConcept) -> WordEmbedding:
        """Of the super-class word."""
        return self.text.embedding(superclass_token(self.text, concept.kind))

    def dress(
        self, taught: Sequence[Taught], knob: float
    ) -> tuple[dict[str, WordEmbedding], AdapterSet]:
        """Words and adapters of several concepts by one method.

        Args:
            taught: at least one, all by the same method.
            knob: bias of the gate for Perfusion, strength for the others.
        """
        method, request = taught[0].method, AdaptationRequest()
        kinds = {t.concept.word: self.kind_embedding(t.concept) for t in taught}
        if method == DREAMBOOTH:
            both = AdapterSet(())
            for t in taught:
                both += lora_adapter_set(t.trained).scaled(knob)
            return kinds, both
        if method == INVERSION:
            words = {
                t.concept.word: tuple(
                    torch.lerp(start, end, knob)
                    for start, end in zip(kinds[t.concept.word], t.trained, strict=True)
                )
                for t in taught
            }
            return words, AdapterSet(())
        words = {t.concept.word: t.trained.embeddings for t in taught}
        if method == INFUSION:
            pairs = [(t.trained, InfusionConfig(knob)) for t in taught]
            return words, Infusion(pairs).adapters(request)
        config = PerfusionConfig(knob, TRAINING.temperature, reach=TRAINING.reach)
        prepared = [(self._prepared(t.trained), config) for t in taught]
        return words, Perfusion(prepared, exact=True).adapters(request)

    def _prepared(self, concept: Concept) -> PreparedConcept:
        embedding = self.text.embedding(superclass_token(self.text, concept.superclass))
        return PreparedConcept(concept, word_encoding(self.text, embedding, concept.contexts))

    def _mark(self, concept: DemoConcept, method: str, config: Any, photos: ConceptPictures) -> str:
        lesson = [wordings(prompt) for prompt in photos.prompts]
        facts = (VERSION, self.base_hash, method, repr(config), repr(concept), lesson)
        digest = hashlib.sha256(repr(facts).encode())
        digest.update((photos.images * 255).round().byte().numpy().tobytes())
        digest.update(self.covariance.matrix.float().numpy().tobytes())
        return digest.hexdigest()[:32]

    def _write(self, path: Path, method: str, trained: Any, seconds: float) -> None:
        """Keep what an artist would keep, in float16."""
        if method in (PERFUSION, INFUSION):
            write_concept(path, replace(trained, facts={**trained.facts, "seconds": seconds}))
            return
        tensors = (
            to_state_dict(trained, dtype=torch.float16)
            if method == DREAMBOOTH
            else {f"embedding.{k}": e.half().contiguous() for k, e in enumerate(trained)}
        )
        write_atomic(tensors, {"seconds": repr(seconds)}, path)

    def _read(self, path: Path, method: str) -> tuple[Any, float]:
        if method in (PERFUSION, INFUSION):
            concept = read_concept(path)
            return concept, float(concept.facts["seconds"])
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key).float() for key in file.keys()}
            seconds = float(file.metadata()["seconds"])
        if method == DREAMBOOTH:
            rank = YardstickConfig(1, 1).rank
            weights: LoRAWeights = from_state_dict(state, self.base.layout("demo", rank)).weights
            return weights, seconds
        return tuple(state[f"embedding.{k}"] for k in range(len(state))), seconds


def training_photos(concept: DemoConcept) -> ConceptPictures:
    """PHOTOS pictures of different people of the split `train` with the concept."""
    people = split_seeds("train", PHOTOS, 90_000)
    return render_concept(concept, people, range(1, PHOTOS + 1))
