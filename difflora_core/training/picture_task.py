"""Everything frozen around training on pictures with prompts: the base and its text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..base_model.protocol import BaseModel, TextCondition
from ..text.encoders import EncodedPrompts, TextEncoders, text_probe, together
from .losses import NoisedBatch, under_guidance


@dataclass(frozen=True, eq=False)
class PictureTask:
    """Everything frozen around training on pictures with prompts.

    Args:
        base, text: the base model and its text encoders.
        base_name: family.
    """

    base: BaseModel
    text: TextEncoders
    base_name: str

    @cached_property
    def facts(self) -> tuple[object, ...]:
        """What a run depends on beside its settings, its pictures and the base's weights."""
        return (self.base_name, text_probe(self.text))

    @cached_property
    def nothing(self) -> TextCondition:
        """One empty prompt, encoded: what guidance starts from."""
        with torch.no_grad():
            empty = self.text.encode([""], {})
        return TextCondition(empty.context, empty.pooled)

    @cached_property
    def _encoded(self) -> dict[str, EncodedPrompts]:
        return {}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> EncodedPrompts:
        """Prompts without new words; each is encoded once in a run, and kept on the CPU."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._encoded:
                made = self.text.encode([prompt], {})
                parts = (made.context.cpu(), made.pooled.cpu(), made.real.cpu())
                self._encoded[prompt] = EncodedPrompts(*parts, {})
        return together([self._encoded[prompt] for prompt in prompts])

    def noised(
        self, batch: Mapping[str, Any], encoded: EncodedPrompts, guidance: float = 1.0
    ) -> NoisedBatch:
        """What a step asks of the base, before anything is attached to it.

        Args:
            batch: of `PictureExamples.draw`.
            encoded: its prompts.
            guidance: see `losses.under_guidance`.
        """
        text = TextCondition(encoded.context, encoded.pooled, batch.get("time_ids"))
        plain = NoisedBatch(batch["latents"], batch["noise"], batch["timesteps"], text)
        if guidance == 1.0:
            return plain
        return under_guidance(self.base, plain, guidance, self.nothing)
