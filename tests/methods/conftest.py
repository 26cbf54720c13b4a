"""A tiny network with cross-attention, random concepts on it and encodings of prompts."""

import pytest
import torch
from torch import nn

from difflora_core.methods.base import PreparedAdaptation, TrainedAdaptation
from difflora_core.methods.registry import METHODS
from difflora_core.text.new_words import LearnedWord

LAYERS = ("input_blocks.1.attn2.to_v", "middle_block.attn2.to_v")
DIM, OUT = 6, 4


class Cross(nn.Module):
    def __init__(self, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.attn2 = nn.ModuleDict(
            {n: nn.Linear(DIM, OUT, bias=False, dtype=torch.float64) for n in ("to_k", "to_v")}
        )
        for layer in self.attn2.values():
            layer.weight.data = torch.randn(OUT, DIM, generator=g, dtype=torch.float64)

    def forward(self, e):
        return (e[..., :OUT] @ self.attn2["to_k"](e).mT).softmax(-1) @ self.attn2["to_v"](e)


class Net(nn.Module):
    """Two cross-attention layers under the names of a UNet."""

    def __init__(self):
        super().__init__()
        self.input_blocks = nn.ModuleList([nn.Identity(), Cross(1)])
        self.middle_block = Cross(2)
        self.requires_grad_(False)

    def forward(self, e):
        return self.input_blocks[1](e) + self.middle_block(e)


@pytest.fixture
def net():
    """Makes a network of two cross-attention layers under the names of a UNet, in float64."""
    return Net


@pytest.fixture
def prepared():
    """Makes a random concept on that network: method, word, and what else is asked for."""

    def make(seed=0, *, method, settings=None, word="<a>", out=OUT):
        g = torch.Generator().manual_seed(seed)
        random = lambda n: torch.randn(n, generator=g, dtype=torch.float64)  # noqa: E731
        direction, dual = random(DIM), random(DIM)
        shared = {"direction": direction, "covector": dual / (dual @ direction)}
        layers = {name: {"values": random(out)} for name in LAYERS}
        name = LearnedWord(word, "hat", (random(3), random(3)), random(64))
        settings = METHODS[method].Config() if settings is None else settings
        made = TrainedAdaptation(method, "tiny", settings, shared, layers, name)
        return PreparedAdaptation(made, random(DIM))

    return make


@pytest.fixture
def encodings():
    """Makes random encodings of two prompts, with a given one at the third token of both."""

    def make(third=None):
        e = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        if third is not None:
            e[:, 2] = third
        return e

    return make
