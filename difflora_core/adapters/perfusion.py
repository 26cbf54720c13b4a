"""Perfusion: gated, key-locked rank-one edits of cross-attention keys and values.

arXiv 2305.01644, section 4. With the concept's direction i*, its covector c = C^-1 i* / i*'C^-1 i*
and an encoding e, the similarity is a = c' e, the gate g = sigmoid((a - bias) / temperature), and

    h = W (e - a i*) + g o*

Keys are locked to the super-class word: o* = W_K i_super, so the key's input alone changes. Values
have a learned o* for each layer. No layer's weight is ever read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, LayoutError
from .base import LayerAdapter
from .first_match import first_match

GateFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SigmoidGate:
    """sigmoid((a - bias) / temperature).

    Args:
        bias: similarity at which the concept is half on, -2 to 3.
        temperature: softness, 0.001 to 10; the smaller, the harder the switch.

    Raises:
        ConfigError: a value is out of range.
    """

    bias: float = 0.6
    temperature: float = 0.15

    def __post_init__(self) -> None:
        if not -2.0 <= self.bias <= 3.0:
            raise ConfigError(f"The gate's bias must lie in -2 to 3, got {self.bias}.")
        if not 0.001 <= self.temperature <= 10.0:
            raise ConfigError(
                f"The gate's temperature must lie in 0.001 to 10, got {self.temperature}."
            )

    def __call__(self, similarity: Tensor) -> Tensor:
        """Gate of similarities, same shape."""
        return torch.sigmoid((similarity - self.bias) / self.temperature)


@dataclass(frozen=True, eq=False)
class GatedConcept:
    """One concept as the layers see it.

    Args:
        direction: i* (in,).
        covector: (in,) with covector' direction = 1.
        superclass: i_super (in,), encoding of the super-class word.
        gate: similarity to gate; a SigmoidGate, or any function.
        strength: 0 leaves the encodings alone, 1 is the full edit.
        reach: largest distance in tokens from the first well matching token at which the concept
            acts; None for every token, 0 for that token alone.
    """

    direction: Tensor
    covector: Tensor
    superclass: Tensor
    gate: GateFunction
    strength: float = 1.0
    reach: int | None = None


@dataclass(frozen=True, eq=False)
class Match:
    """What concepts find in encodings (B, L, in).

    `gate`: (B, L, J), strength included; `rest`: (B, L, in) encodings without the concepts;
    `locked`: (B, L, in) encodings with the concepts replaced by their super-class words.
    """

    gate: Tensor
    rest: Tensor
    locked: Tensor

    def added(self, y: Tensor, rows: Tensor) -> Tensor:
        """y + sum of g o* for y (B, L, out) and one row o* (J, out) for each concept."""
        gate = self.gate.to(y.dtype).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), gate, rows.to(y)).view_as(y)


class ConceptMatcher:
    """Similarities, gates and the rest of encodings for J concepts, once for all layers.

    Every cross-attention layer of a model gets the same encodings, so the last result is kept as
    long as that tensor lives unchanged. It may carry gradients: make a new matcher for every
    training step.

    Args:
        concepts: at least one.
        exact: project onto the span of all directions (QR form of the paper, here through the
            J x J Gram matrix); otherwise each concept is taken out as if it were alone. Equal for
            C^-1-orthogonal concepts.
    """

    def __init__(self, concepts: Sequence[GatedConcept], exact: bool = False) -> None:
        if not concepts:
            raise ConfigError("There is no concept to apply.")
        self.concepts, self.exact = tuple(concepts), exact
        self.rows: Tensor | None = None
        self._last: tuple[weakref.ref[Tensor], int, Match] | None = None

    def __call__(self, x: Tensor) -> Match:
        """The match of encodings (B, L, in); any other shape (..., in) without token distances."""
        version = 0 if x.is_inference() else x._version
        if self._last is not None and self._last[0]() is x and self._last[1] == version:
            return self._last[2]
        match = self._match(x)
        self._last = (weakref.ref(x), version, match)
        return match

    def select_rows(self, rows: Tensor | None) -> None:
        """Rows (B,) of the next batches on which the concepts act, 0 to 1; None for all."""
        self.rows, self._last = rows, None

    def _match(self, x: Tensor) -> Match:
        dtype = torch.promote_types(x.dtype, torch.float32)
        device = x.device
        covectors = torch.stack([c.covector for c in self.concepts]).to(device, dtype)  # J in
        directions = torch.stack([c.direction for c in self.concepts]).to(device, dtype)  # J in
        if x.shape[-1] != directions.shape[-1]:
            raise LayoutError(
                f"This concept is for text encodings of width {directions.shape[-1]}, but the "
                f"model uses {x.shape[-1]}. Use the base model family it was trained on."
            )
        fine = x.to(dtype)
        similarity = fine @ covectors.mT  # B L J
        gates = [c.gate(a) for c, a in zip(self.concepts, similarity.unbind(-1), strict=True)]
        gate, share = torch.stack(gates, -1), similarity
        if self.exact and len(self.concepts) > 1:
            # s = G c with s_j = e' C^-1 i_j; both sides divided by the energies.
            gram = covectors @ directions.mT  # J J
            share = torch.linalg.solve(gram, similarity.mT).mT
        weight = self._weights(fine, similarity)
        gate, rest = gate * weight, fine - (share * weight) @ directions
        anchors = torch.stack([c.superclass for c in self.concepts]).to(device, dtype)  # J in
        locked = rest + gate @ anchors
        return Match(gate.to(x.dtype), rest.to(x.dtype), locked.to(x.dtype))

    def _weights(self, fine: Tensor, similarity: Tensor) -> Tensor:
        """Strength of each concept at each token of each row, broadcastable to (B, L, J)."""
        weights = similarity.new_tensor([c.strength for c in self.concepts])
        if any(c.reach is not None for c in self.concepts):
            length = similarity.shape[-2]
            own = first_match(fine, similarity)
            index = torch.arange(length, device=similarity.device)[:, None]
            reach = [length if c.reach is None else c.reach for c in self.concepts]
            near = (index - own).abs() <= torch.tensor(reach, device=similarity.device)
            weights = weights * near
        if self.rows is not None:
            weights = weights * self.rows.to(weights)[:, None, None]
        return weights


class PerfusionKeyAdapter(LayerAdapter):
    """Local key lock: the key sees e_perp + g i_super, so W_K itself makes o*_K = W_K i_super.

    `matcher` is shared by all layers.
    """

    def __init__(self, matcher: ConceptMatcher) -> None:
        self.matcher = matcher

    def substitute(self, x: Tensor) -> Tensor:
        """Encodings (B, L, in) with the concepts replaced by their super-class words."""
        return self.matcher(x).locked

    def state_dict(self) -> dict[str, Tensor]:
        """The concepts, see `concept_state`."""
        return concept_state(self.matcher)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> PerfusionKeyAdapter:
        """Adapter from the tensors of ``state_dict``."""
        return cls(matcher_from_state(state))


class PerfusionValueAdapter(LayerAdapter):
    """The value path: W_V e_perp + sum over concepts of g o*.

    Args:
        matcher: shared by all layers.
        targets: o* (J, out) of this layer, one row per concept; gradients flow into it.
    """

    def __init__(self, matcher: ConceptMatcher, targets: Tensor) -> None:
        if targets.ndim != 2 or len(targets) != len(matcher.concepts):
            count, got = len(matcher.concepts), tuple(targets.shape)
            raise LayoutError(f"{count} concepts need as many value targets, got {got}.")
        self.matcher, self.targets = matcher, targets

    def substitute(self, x: Tensor) -> Tensor:
        """Encodings (B, L, in) without the concepts."""
        return self.matcher(x).rest

    def edit(self, x: Tensor, y: Tensor) -> Tensor:
        """y + sum of g o*; x (B, L, in), y (B, L, out)."""
        if y.shape[-1] != self.targets.shape[-1]:
            raise LayoutError(
                f"This concept has values of width {self.targets.shape[-1]}, but the layer gives "
                f"{y.shape[-1]}. Use the base model it was trained on."
            )
        return self.matcher(x).added(y, self.targets)

    def state_dict(self) -> dict[str, Tensor]:
        """The concepts and the ``targets`` of this layer."""
        return {**concept_state(self.matcher), "targets": self.targets}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> PerfusionValueAdapter:
        """Adapter from the tensors of ``state_dict``."""
        return cls(matcher_from_state(state), state["targets"])


class GlobalKeyAdapter(LayerAdapter):
    """Global key lock: keys see the encoding of the whole prompt with the super-class word.

    Args:
        context: (1 or B, L, in), made by the same text encoders.
        rows: (B,) rows it replaces, 0 to 1; None for all.
    """

    def __init__(self, context: Tensor, rows: Tensor | None = None) -> None:
        self.context, self.rows = context, rows

    def select_rows(self, rows: Tensor | None) -> None:
        """Rows (B,) of the next batches that are replaced; None for all."""
        self.rows = rows

    def substitute(self, x: Tensor) -> Tensor:
        """The super-class encoding in the chosen rows; x (B, L, in)."""
        context = self.context.to(x)
        if context.shape[-2:] != x.shape[-2:] or len(context) not in (1, len(x)):
            raise LayoutError(
                f"The super-class prompt has the shape {tuple(context.shape)}, the prompt itself "
                f"{tuple(x.shape)}: encode both with the same CLIP, and make them equally long."
            )
        if self.rows is None:
            return context.expand_as(x)
        return torch.lerp(x, context.expand_as(x), self.rows.to(x)[:, None, None])

    def state_dict(self) -> dict[str, Tensor]:
        """Tensor ``context``."""
        return {"context": self.context}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> GlobalKeyAdapter:
        """Adapter from the tensors of ``state_dict``."""
        return cls(state["context"])


def concept_state(matcher: ConceptMatcher) -> dict[str, Tensor]:
    """Tensors (J, ...) that rebuild a matcher with sigmoid gates.

    Raises:
        ConfigError: a gate is not a SigmoidGate.
    """
    numbers = []
    for c in matcher.concepts:
        gate, reach = c.gate, -1 if c.reach is None else c.reach
        if not isinstance(gate, SigmoidGate):
            raise ConfigError("Only concepts with sigmoid gates can be stored.")
        numbers.append((gate.bias, gate.temperature, c.strength, reach))
    names = ("direction", "covector", "superclass")
    parts = {name: torch.stack([getattr(c, name) for c in matcher.concepts]) for name in names}
    settings = torch.tensor(numbers, dtype=torch.float64)
    return {**parts, "settings": settings, "exact": torch.tensor(matcher.exact)}


def matcher_from_state(state: Mapping[str, Tensor]) -> ConceptMatcher:
    """Matcher from the tensors of `concept_state`."""
    concepts = []
    rows = [state[name] for name in ("direction", "covector", "superclass", "settings")]
    for direction, covector, superclass, settings in zip(*rows, strict=True):
        bias, temperature, strength, reach = settings.tolist()
        gate, near = SigmoidGate(bias, temperature), None if reach < 0 else int(reach)
        parts = (direction, covector, superclass)
        concepts.append(GatedConcept(*parts, gate, strength, near))
    return ConceptMatcher(concepts, bool(state["exact"]))
