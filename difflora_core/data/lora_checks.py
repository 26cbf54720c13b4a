"""Is a LoRA of a corpus fit to learn from: finite, of a usual strength, and like its person."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from ..config import Config, check_range
from ..lora.distance import squared_norm
from ..lora.weights import LoRAWeights


@dataclass(frozen=True)
class LoRACheckSettings(Config):
    """What a LoRA of a corpus must reach.

    Attributes:
        likeness: cosine of the faces in pictures drawn with it with the person's; -1 asks for none,
            and LoRAs of which nobody measured it always pass.
        spread: how many times stronger or weaker than the usual one of the corpus it may be, by the
            norm of its weight change.

    Raises:
        ConfigError: a value is out of range.
    """

    likeness: float = -1.0
    spread: float = 5.0

    def __post_init__(self) -> None:
        check_range("LoRA checks", "likeness", self.likeness, -1, 1)
        check_range("LoRA checks", "spread", self.spread, 1, 1e6)


def why_unusable(weights: LoRAWeights) -> tuple[float, str]:
    """The norm of delta W, and why it cannot be learned from whatever the others are.

    Args:
        weights: one LoRA.

    Returns:
        Frobenius norm over all layers, 0 where it is not finite; the reason, empty where there is
        none.
    """
    fine = weights.detach().to(torch.float32)
    for name, layer in fine.layers.items():
        if not bool(layer.down.isfinite().all()) or not bool(layer.up.isfinite().all()):
            return 0.0, f"{name} holds values that are not finite"
    norm = float(squared_norm(fine).sqrt())
    if not math.isfinite(norm):
        return 0.0, "its change is too large to be a number"
    return norm, "" if norm > 0 else "it changes nothing"


def why_unlike_others(
    norms: Sequence[float], likeness: Iterable[float | None], settings: LoRACheckSettings
) -> list[str]:
    """Why each LoRA does not suit its corpus, empty where it does.

    Args:
        norms: of delta W, positive.
        likeness: that each reached; None where nobody measured.
        settings: what counts.
    """
    usual = median(norms) if norms else 1.0
    reasons = []
    for norm, alike in zip(norms, likeness, strict=True):
        factor = norm / usual
        reason = ""
        if not 1 / settings.spread <= factor <= settings.spread:
            reason = f"its change is {factor:.3g} times as strong as the usual one"
        if alike is not None and alike < settings.likeness:
            reason = f"its likeness is {alike:.3f}, below {settings.likeness:g}"
        reasons.append(reason)
    return reasons
