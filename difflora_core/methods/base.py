"""What every method has in common: the record of what was trained, and the way to apply it.

A method is an adapter (adapters/), a file here, a recipe (training/), node texts (nodes/), all of
the same stem, and a line in the registry. Everything else goes through these records.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from ..adapters.base import AdapterSet, Strength
from ..config import Config
from ..errors import ConfigError, LayoutError
from ..lora.block_groups import GroupStrengths
from ..lora.weights import LoRAWeights
from ..text.covariance import normalised
from ..text.new_words import LearnedWord

Facts = Mapping[str, str | int | float]
Settings = TypeVar("Settings", bound=Config)


@dataclass(frozen=True, eq=False)
class TrainedAdaptation:
    """What training leaves, and what an adapter file holds; the same for all methods (ours).

    Args:
        method: name of the method, see `registry.METHODS`.
        base: name of the base model family.
        settings: the method's `Config`: how it is applied unless somebody asks otherwise.
        shared: tensors that all layers share, by name.
        layers: layer name to its tensors, by name.
        word: the word that it is called by, if it has one.
        facts: free facts about its making, texts and numbers.

    Raises:
        LayoutError: no layer, or values that are not finite.
    """

    method: str
    base: str
    settings: Config
    shared: Mapping[str, Tensor]
    layers: Mapping[str, Mapping[str, Tensor]]
    word: LearnedWord | None = None
    facts: Facts = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = [tensor for tensors in self.layers.values() for tensor in tensors.values()]
        if not self.layers or not all(self.layers.values()):
            raise LayoutError(f"{self.title} changes no layer.")
        if not all(bool(torch.isfinite(t).all()) for t in [*self.shared.values(), *own]):
            raise LayoutError(f"{self.title} holds values that are not finite.")

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"The concept {self.word.word}" if self.word else f"This {self.method} adaptation"

    def to(self, *target: torch.dtype | torch.device | str) -> TrainedAdaptation:
        """The same with its tensors on another device or of another dtype; its word stays."""

        def moved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: _moved(tensor, target) for name, tensor in tensors.items()}

        layers = {layer: moved(tensors) for layer, tensors in self.layers.items()}
        return replace(self, shared=moved(self.shared), layers=layers)


def _moved(tensor: Tensor, targets: Sequence[torch.dtype | torch.device | str]) -> Tensor:
    for target in targets:
        tensor = tensor.to(target)
    return tensor


@dataclass(frozen=True, eq=False)
class PreparedAdaptation:
    """An adaptation together with what the live text encoders say of its word's kind.

    Args:
        adaptation: from a file or from training.
        superclass: (d,) encoding of the super-class word, recomputed and never stored; None where
            there is no word.
    """

    adaptation: TrainedAdaptation
    superclass: Tensor | None = None

    def to(self, device: torch.device | str) -> PreparedAdaptation:
        """The same with its tensors on another device."""
        here = None if self.superclass is None else self.superclass.to(device)
        return PreparedAdaptation(self.adaptation.to(device), here)


@dataclass(frozen=True, eq=False)
class AppliedAdaptation:
    """An adaptation as it is applied.

    Args:
        prepared: what was trained.
        settings: the method's `Config`.
        strength: 0 leaves the model alone, 1 is as trained; or one for each sample (B,).
        superclass_prompt: (1, L, d) the prompt with the super-class word, if settings ask for it.
        blocks: factors on the strength in parts of the model.
        since: (B, L) where its word stands in the prompts, see `GatedConcept`; None where nobody
            knows.
    """

    prepared: PreparedAdaptation
    settings: Config
    strength: Strength = 1.0
    superclass_prompt: Tensor | None = None
    blocks: GroupStrengths = field(default_factory=GroupStrengths)
    since: Tensor | None = None

    @property
    def adaptation(self) -> TrainedAdaptation:
        """What was trained."""
        return self.prepared.adaptation

    def spoken(self, since: Tensor) -> AppliedAdaptation:
        """The same in prompts of which is known where its word stands.

        Args:
            since: (B, L) see `GatedConcept`; without strength in samples that never hear the word.
        """
        there = since.isfinite().any(-1)
        strength = self.strength if bool(there.all()) else self.strength * there.float()
        return replace(self, since=since, strength=strength)

    def to(self, device: torch.device | str) -> AppliedAdaptation:
        """The same with its tensors on another device."""
        prompt = self.superclass_prompt
        return replace(
            self,
            prepared=self.prepared.to(device),
            superclass_prompt=None if prompt is None else prompt.to(device),
        )


class LiveLayers(Protocol):
    """The layers of a loaded base model, by name, whatever their storage is."""

    def __call__(self, layer: str, rows: Tensor) -> Tensor:
        """What a layer makes of rows (n, in): (n, out)."""

    def weight(self, layer: str) -> Tensor:
        """Its weight (out, in) or (out, in, kh, kw), float32 or better, on the CPU."""


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """A new weight made from the live one; at strength s: weight + s (new - weight).

    `function`: (weight, *tensors) to the new weight, of the same shape. `tensors`: what it needs.
    """

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


class Method(ABC):
    """A way to adapt a base model; a class without instances.

    `name`: in files, and the stem of its files. `Config`: its settings when it is applied.
    `of_base`: it takes something from the base model's own output, and not from what others add to
    it, so it acts before them wherever it stands.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Config]]
    of_base: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def check(cls, adaptation: TrainedAdaptation) -> None:
        """Refuse tensors that this method does not have, or that do not fit each other.

        Raises:
            LayoutError: it says which.
        """

    @classmethod
    def restored(cls, adaptation: TrainedAdaptation) -> TrainedAdaptation:
        """A checked adaptation from a file, with what rounding has disturbed put right."""
        return adaptation

    @classmethod
    @abstractmethod
    def layer_sizes(cls, adaptation: TrainedAdaptation) -> Mapping[str, tuple[int, ...]]:
        """Layer to the `module_size` that the adaptation was made for."""

    @classmethod
    @abstractmethod
    def adapters(cls, applied: Sequence[AppliedAdaptation]) -> AdapterSet:
        """Adapters of adaptations of this method that follow one another on a model.

        Raises:
            ConfigError, LayoutError: they cannot be together.
        """

    @classmethod
    def weight_edits(cls, applied: AppliedAdaptation) -> dict[str, WeightEdit] | None:
        """Layer to what the whole adaptation makes of its weight; None where it is no such thing.

        With them a host changes weights once instead of outputs in every step.
        """
        del applied
        return None

    @classmethod
    def as_lora(
        cls, prepared: PreparedAdaptation, project: LiveLayers, lock_keys: bool = True
    ) -> LoRAWeights:
        """The adaptation as a plain LoRA, as nearly as it can be one.

        Args:
            prepared: what was trained.
            project: the layers of the base model that the LoRA is for.
            lock_keys: keep the layout of the super-class word, where a method can.

        Raises:
            ConfigError: it depends on its input, so no LoRA is like it.
        """
        raise ConfigError(
            f"{prepared.adaptation.title} was trained by {cls.name}, which has no form as a plain "
            "LoRA."
        )

    @classmethod
    def lost_as_lora(cls, adaptation: TrainedAdaptation) -> tuple[str, ...]:
        """What `as_lora` leaves out, as ends of the sentence "As a LoRA ..."."""
        return ()

    @classmethod
    def exports_lora(cls) -> bool:
        """True when `as_lora` is more than a refusal."""
        return cls.as_lora.__func__ is not Method.as_lora.__func__  # type: ignore[attr-defined]


def layout_hash(sizes: Mapping[str, tuple[int, ...]]) -> str:
    """Digest of layer names and sizes: equal for adaptations of one base model."""
    lines = sorted(f"{name} {' '.join(map(str, size))}" for name, size in sizes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def with_settings(adaptation: TrainedAdaptation, wanted: Mapping[str, Any]) -> Config:
    """The settings that an adaptation came with, changed by those of `wanted` that it knows.

    Raises:
        ConfigError: a value is out of range.
    """
    kind = type(adaptation.settings)
    changed = {name: value for name, value in wanted.items() if has_setting(kind, name)}
    return replace(adaptation.settings, **changed)  # type: ignore[type-var]


class StyleMethod(Method):
    """A method whose adaptation is a look: it has no word, and every prompt gets it."""

    @classmethod
    def check(cls, adaptation: TrainedAdaptation) -> None:
        """Refuse a word.

        Raises:
            LayoutError: it has one.
        """
        if adaptation.word is not None:
            raise LayoutError(f"{adaptation.title} has a word, but {cls.name} teaches none.")

    @classmethod
    @abstractmethod
    def one(cls, applied: AppliedAdaptation) -> AdapterSet:
        """Adapters of one adaptation, its strength included."""

    @classmethod
    def adapters(cls, applied: Sequence[AppliedAdaptation]) -> AdapterSet:
        """Styles act one after another: the next one sees what the one before made."""
        return sum((cls.one(part) for part in applied), AdapterSet(()))


class ConceptMethod(Method):
    """A method whose adaptation is a word with a direction, and a vector for each value projection.

    Tensors: `direction` i* (d,), `covector` (d,) whose product with it is 1, and for each layer
    `values` (out,).
    """

    @classmethod
    def check(cls, adaptation: TrainedAdaptation) -> None:
        """Refuse other tensors than a concept's.

        Raises:
            LayoutError: it has no word, or its tensors are not those of a concept.
        """
        shared, layers = adaptation.shared, adaptation.layers
        if adaptation.word is None:
            raise LayoutError(f"{adaptation.title} has no word, but {cls.name} needs one.")
        other = [layer for layer, tensors in layers.items() if set(tensors) != {"values"}]
        if set(shared) != {"direction", "covector"} or other:
            raise LayoutError(f"{adaptation.title} does not hold the tensors of {cls.name}.")
        vectors = [*shared.values(), *(t["values"] for t in layers.values())]
        if any(v.ndim != 1 or not len(v) for v in vectors):
            raise LayoutError(f"{adaptation.title} has parts that are not vectors.")
        if shared["direction"].shape != shared["covector"].shape:
            raise LayoutError(f"{adaptation.title} has a direction and covector that differ.")
        if not abs(_product(shared)) > 1e-12:
            raise LayoutError(
                f"{adaptation.title}: its direction and covector do not belong together."
            )

    @classmethod
    def restored(cls, adaptation: TrainedAdaptation) -> TrainedAdaptation:
        """The same, the product of covector and direction 1 again."""
        shared = dict(adaptation.shared)
        shared["covector"] = shared["covector"] / _product(shared)
        return replace(adaptation, shared=shared)

    @classmethod
    def layer_sizes(cls, adaptation: TrainedAdaptation) -> dict[str, tuple[int, int]]:
        """Width of the text encodings, and of each layer's values."""
        width = len(adaptation.shared["direction"])
        return {layer: (width, len(t["values"])) for layer, t in adaptation.layers.items()}

    @classmethod
    def values(cls, applied: Sequence[AppliedAdaptation], layer: str) -> Tensor:
        """One row (J, out) for each of several concepts."""
        return torch.stack([part.adaptation.layers[layer]["values"] for part in applied])

    @classmethod
    def check_together(cls, applied: Sequence[AppliedAdaptation]) -> None:
        """Refuse concepts that cannot share a model.

        Raises:
            ConfigError: none, another method's, or one word twice.
            LayoutError: different base models or layers.
        """
        if not applied:
            raise ConfigError("There is no concept to apply.")
        concepts = [part.adaptation for part in applied]
        for concept in concepts:
            if concept.method != cls.name:
                raise ConfigError(
                    f"{concept.title} was trained by {concept.method}, not by {cls.name}."
                )
        words = [concept.word.word for concept in concepts if concept.word]
        if len(set(words)) < len(words):
            raise ConfigError(
                f"Two concepts share the word {max(words, key=words.count)}: train or load one of "
                "them under another word."
            )
        first = concepts[0]
        for other in concepts[1:]:
            if cls.layer_sizes(first) != cls.layer_sizes(other):
                raise LayoutError(
                    f"{first.title} ({first.base}) and {other.title} ({other.base}) are for "
                    "different base models."
                )


def has_setting(kind: type[Config], name: str) -> bool:
    """True when settings of this kind have a field of this name."""
    return name in {f.name for f in fields(kind)}  # type: ignore[arg-type]


def settings_as(kind: type[Settings], settings: Config) -> Settings:
    """Settings, if they are those of one method.

    Raises:
        ConfigError: they are another method's.
    """
    if not isinstance(settings, kind):
        raise ConfigError(f"{kind.__name__} was expected, not {type(settings).__name__}.")
    return settings


def unit_covector(adaptation: TrainedAdaptation) -> Tensor:
    """A concept's covector (d,), its product with the direction exactly 1."""
    return normalised(adaptation.shared["covector"], adaptation.shared["direction"])


def _product(shared: Mapping[str, Tensor]) -> float:
    """Of covector and direction, in float64."""
    return float((shared["direction"].double() * shared["covector"].double()).sum())
