"""Which tokens of a prompt a concept acts on, and how strongly: similarity, gate, place.

With a concept's direction i* and its covector c = C^-1 i* / i*'C^-1 i* (arXiv 2305.01644, section
4) the similarity of an encoding e is a = c' e. A gate maps it to 0 to 1. Encodings are looked at
once for all cross-attention layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, LayoutError
from .base import Strength

SHARE_OF_BEST = 0.7
"""Of the largest similarity in a prompt: from here on a token matches well."""
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
        """Gate in [0, 1] of similarities (...), of the same shape."""
        return torch.sigmoid((similarity - self.bias) / self.temperature)


class TokenGate:
    """1 at similarities of at least `threshold`, else 0: a gate that switches.

    Args:
        threshold: similarity from which a token can be the concept's, above 0.

    Raises:
        ConfigError: the threshold is not in 0 to 3, or is 0.
    """

    def __init__(self, threshold: float) -> None:
        if not 0.0 < threshold <= 3.0:
            raise ConfigError(f"The threshold must lie in 0 to 3, got {threshold}.")
        self.threshold = threshold

    def __call__(self, similarity: Tensor) -> Tensor:
        """Gate, 0 or 1, of similarities (...), of the same shape."""
        return (similarity >= self.threshold).to(similarity)


@dataclass(frozen=True, eq=False)
class GatedConcept:
    """One concept as the layers see it.

    Args:
        direction: i* (in,).
        covector: (in,) with covector' direction = 1.
        superclass: i_super (in,), encoding of the super-class word.
        gate: similarity to gate; a SigmoidGate, or any function.
        strength: 0 leaves the encodings alone, 1 is the full edit; one number, or one for each
            sample (B,).
        reach: largest distance in tokens from its word at which the concept acts; None for every
            token that hears of it, 0 for the word alone.
        since: tokens since its word was written, (B, L) for each token of each sample: 0 at the
            word, infinity where it is not heard. The concept acts nowhere else, and its word is
            wholly the concept whatever stands around it. None where nobody knows: then it is the
            first token that matches well, and without a reach every token.
    """

    direction: Tensor
    covector: Tensor
    superclass: Tensor
    gate: GateFunction
    strength: Strength = 1.0
    reach: int | None = None
    since: Tensor | None = None

    def gated(self, similarity: Tensor) -> Tensor:
        """Gate of similarities (B, L); at the word itself of those of training, which are 1."""
        if self.since is not None:
            known = _fitted(self.since, similarity.shape[-1]).to(similarity.device)
            similarity = torch.where(known == 0, similarity.clamp(min=1.0), similarity)
        return self.gate(similarity)


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
    long as that tensor lives unchanged. Under gradients every call computes its own: a checkpointed
    layer must do the same when it runs again.

    Args:
        concepts: at least one.
        exact: project onto the span of all directions (QR form of the paper, here through the
            J x J Gram matrix); otherwise each concept is taken out as if it were alone. Equal for
            C^-1-orthogonal concepts.

    Raises:
        ConfigError: there is no concept.
    """

    def __init__(self, concepts: Sequence[GatedConcept], exact: bool = False) -> None:
        if not concepts:
            raise ConfigError("There is no concept to apply.")
        self.concepts, self.exact = tuple(concepts), exact
        self._last: tuple[weakref.ref[Tensor], int, Match] | None = None

    def __call__(self, x: Tensor) -> Match:
        """The match of encodings (B, L, in); any other shape (..., in) without token distances."""
        if torch.is_grad_enabled():
            return self._match(x)
        version = 0 if x.is_inference() else x._version
        if self._last is not None and self._last[0]() is x and self._last[1] == version:
            return self._last[2]
        match = self._match(x)
        self._last = (weakref.ref(x), version, match)
        return match

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
        gates = [c.gated(a) for c, a in zip(self.concepts, similarity.unbind(-1), strict=True)]
        gate, share = torch.stack(gates, -1), similarity
        strengths = self._strengths(similarity)
        if self.exact and len(self.concepts) > 1:
            # s = G c with s_j = e' C^-1 i_j, both sides divided by the energies; what has no
            # strength in a sample is not there.
            there = strengths != 0  # J, or B J
            pairs = there[..., :, None] & there[..., None, :]
            gram = torch.where(pairs, covectors @ directions.mT, torch.eye(len(covectors)).to(fine))
            share = torch.linalg.solve(gram, similarity.mT).mT
        weight = self._weights(fine, similarity, strengths)
        gate, rest = gate * weight, fine - (share * weight) @ directions
        anchors = torch.stack([c.superclass for c in self.concepts]).to(device, dtype)  # J in
        locked = rest + gate @ anchors
        return Match(gate.to(x.dtype), rest.to(x.dtype), locked.to(x.dtype))

    def _strengths(self, similarity: Tensor) -> Tensor:
        """Strength of each concept (J,), or of each in each sample (B, J)."""
        dtype, device = similarity.dtype, similarity.device
        strengths = [torch.as_tensor(c.strength, dtype=dtype, device=device) for c in self.concepts]
        return torch.stack(torch.broadcast_tensors(*strengths), -1)

    def _weights(self, fine: Tensor, similarity: Tensor, strengths: Tensor) -> Tensor:
        """Strength of each concept at each token of each row, broadcastable to (B, L, J)."""
        weights = strengths[:, None] if strengths.ndim > 1 else strengths
        if all(c.reach is None and c.since is None for c in self.concepts):
            return weights
        length = similarity.shape[-2]
        index = torch.arange(length, device=similarity.device)[:, None]
        guessed = (index - first_match(fine, similarity)).abs()
        near = []
        for concept, distance in zip(self.concepts, guessed.unbind(-1), strict=True):
            if concept.since is not None:
                distance = _fitted(concept.since, length).to(similarity.device)
            near.append(distance <= (length if concept.reach is None else concept.reach))
        return weights * torch.stack(torch.broadcast_tensors(*near), -1)


def _fitted(since: Tensor, length: int) -> Tensor:
    """Distances (B, L) for another number of tokens: what others appended hears of no word."""
    missing = max(0, length - since.shape[-1])
    return F.pad(since, (0, missing), value=torch.inf)[..., :length]


def first_match(encodings: Tensor, similarity: Tensor) -> Tensor:
    """The token at which the word of each concept stands (ours).

    A causal text encoder hands a word on to the tokens after it, which may match better than the
    word itself; the tokens before it know nothing of it. So it is the first that matches well. The
    start mark, always the first token, is no word; longer prompts have it again in every part.

    Args:
        encodings: (B, L, in) of whole prompts, start marks first.
        similarity: (B, L, J) of each concept.

    Returns:
        Indices (B, 1, J).
    """
    start = (encodings == encodings[..., :1, :]).all(-1)[..., None]  # B L 1
    words = similarity.masked_fill(start, -torch.inf)
    best = words.amax(-2, keepdim=True)
    enough = torch.where(best > 0, SHARE_OF_BEST * best, best)
    return (words >= enough).int().argmax(-2, keepdim=True)
