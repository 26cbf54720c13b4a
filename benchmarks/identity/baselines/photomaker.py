"""PhotoMaker: photos merged into the class word of the prompt (arXiv:2312.04461)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from difflora_core.adapters.attach import attach
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.base_model.protocol import TextCondition
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.vision.features import FeatureSizes

from .base import Baseline, Person, Photos

CLASS_WORD = 4
"""Place of "person" in every prompt: after the start, "photo of a"."""
RANK = 4


class PhotoMaker(Baseline):
    """Every photo makes a token of "person"; the tokens stand side by side in its place."""

    source = (
        "PhotoMaker (arXiv:2312.04461): stacked identity embedding in the class word, and a LoRA "
        "of the attention that serves all people; the face embedding beside the picture's, as in "
        "its second version"
    )

    def __init__(self, base: DiffusersBase, sizes: FeatureSizes) -> None:
        super().__init__(base, sizes)
        width = base.unet.config.cross_attention_dim
        self.project = nn.Linear(sizes.face + sizes.image, width)
        self.merge = residual_block(2 * width, width)
        self.refine = residual_block(width, width)
        self.norm = nn.LayerNorm(width)
        self.layout = base.layout("demo", RANK)
        shapes = list(self.layout)
        self.down = nn.ParameterList(
            torch.randn(RANK, s.in_features) / math.sqrt(s.in_features) for s in shapes
        )
        self.up = nn.ParameterList(torch.zeros(s.out_features, RANK) for s in shapes)

    def person(self, photos: Photos) -> Person:
        """One vector for each photo (B, N, C)."""
        seen = torch.cat([self.faces(photos), self.image_norm(photos.image)], -1)
        return {"photos": self.project(seen)}

    def text(self, text: TextCondition, person: Person, strength: float) -> TextCondition:
        """Prompts in which the class word is N tokens, each of them merged with one photo."""
        word = text.context[:, CLASS_WORD : CLASS_WORD + 1].expand_as(person["photos"])  # B N C
        merged = word + self.merge(torch.cat([word, person["photos"]], -1))
        merged = self.norm(merged + self.refine(merged))
        parts = [
            text.context[:, :CLASS_WORD],
            torch.lerp(word, merged.to(word), strength),
            text.context[:, CLASS_WORD + 1 :],
        ]
        return TextCondition(torch.cat(parts, 1), text.pooled, text.time_ids)

    @contextmanager
    def steered(
        self, base: DiffusersBase, person: Person, strength: float
    ) -> Iterator[DiffusersBase]:
        """The base with the LoRA that reads the new tokens."""
        del person
        with attach(
            base.unet, lora_adapter_set(self.weights()), strength, self.layout.module_names
        ):
            yield base

    def weights(self) -> LoRAWeights:
        """The LoRA of everybody; gradients flow."""
        rows = zip(self.layout, self.down, self.up, strict=True)
        return LoRAWeights({s.name: LoRALayer(down, up, float(RANK)) for s, down, up in rows})


def residual_block(before: int, after: int) -> nn.Sequential:
    """The change of a residual block of PhotoMaker's fuse module."""
    return nn.Sequential(
        nn.LayerNorm(before), nn.Linear(before, after), nn.GELU(), nn.Linear(after, after)
    )
