"""Small jobs that are killed at any moment: each goes on in its folder, and ends in one digest.

They are the writers that a person trusts with hours: the training loop, DreamBooth, a corpus, a
concept, an identity library. Each takes a second or two over networks of a few thousand weights,
and saves after every step or two, so that a kill meets all of its moments.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.base_model.protocol import TextCondition
from difflora_core.config import parse_json
from difflora_core.demo.networks.text import (
    END,
    LENGTH,
    PAD,
    START,
    UNKNOWN,
    text_config,
    word_numbers,
)
from difflora_core.lora.weights import LoRAWeights
from difflora_core.models.lae.autoencoder import LoRALatent
from difflora_core.models.layers import DrawnFrom
from difflora_core.storage.adapter_file import write_adaptation
from difflora_core.storage.identity_library import add_people
from difflora_core.storage.library_file import Library, read_library
from difflora_core.storage.safetensors_io import read_header
from difflora_core.text.captions import captions
from difflora_core.text.clip_pair import ClipPairText, SpecialTokens
from difflora_core.text.covariance import build_covariance
from difflora_core.text.encoders import TextEncoders
from difflora_core.training.adaptation_run import run_adaptation
from difflora_core.training.concept_task import NewWord, prepare_task
from difflora_core.training.difflora.lora_corpus import CorpusConfig, build_corpus
from difflora_core.training.fingerprint import fingerprint
from difflora_core.training.loop import ByStep, Hooks, LoopConfig, train
from difflora_core.training.lora.dreambooth import (
    DreamBoothConfig,
    DreamBoothExamples,
    train_dreambooth,
)
from difflora_core.training.perfusion import PerfusionObjective, PerfusionTraining
from difflora_core.training.picture_examples import PictureExamples
from difflora_core.training.state_file import STATE

Acknowledge = Callable[[int], None]
"""Told how much is on disk for good."""

PEOPLE = 12
"""Of the library."""


@dataclass(frozen=True)
class Job:
    """Something that goes on from its folder.

    Args:
        run: begins in a folder, or goes on there; tells what is safe, and returns the digest of
            its result.
        saved: how much of it a folder holds, in the numbers that `run` acknowledges.
    """

    run: Callable[[Path, Acknowledge], str]
    saved: Callable[[Path], int]


class Network(nn.Module):
    """What the loop trains: matrices for Muon, vectors for AdamW, buffers of a norm."""

    def __init__(self) -> None:
        super().__init__()
        with DrawnFrom(torch.Generator().manual_seed(0)):
            self.norm, self.net = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error () of a batch `x` (B, 8), `y` (B, 8), and nothing beside it."""
        return (self.net(self.norm(batch["x"])) - batch["y"]).square().mean(), {}


def loop(folder: Path, acknowledge: Acknowledge) -> str:
    """The training loop with everything that it can hold; see `Job.run`."""
    network, generator = Network(), torch.Generator().manual_seed(1)
    config = LoopConfig(
        steps=40, matrix_rate=0.01, ema=0.9, checkpoint_every=2, log_every=3, validate_every=5,
        patience=0, validate_first=True,
    )  # fmt: skip

    def batch(step: int) -> dict[str, Tensor]:
        acknowledge(step // 2 * 2)
        x = torch.randn(16, 8, generator=generator)
        return {"x": x, "y": x.flip(1) + torch.randn(16, 8, generator=generator)}

    def validate() -> float:
        with torch.no_grad():
            return float((network.net.weight - torch.eye(8).flip(1)).square().mean())

    result = train(network, ByStep(batch, generator), config, folder, Hooks(validate=validate))
    events = (folder / "events.jsonl").read_text("utf-8")
    return fingerprint(dict(network.state_dict()), result["validation"], events)


def dreambooth(folder: Path, acknowledge: Acknowledge) -> str:
    """DreamBooth of two people with a snapshot; see `Job.run`."""
    config = DreamBoothConfig(rank=2, steps=8, snapshots=(5,), checkpoint_every=1)
    people = examples((3, 5))
    kept = train_dreambooth(
        tiny_base(), people, config, lambda step, *_: acknowledge(step - 1), folder=folder
    )
    return fingerprint([_factors(weights) for weights in kept.values()])


def corpus(folder: Path, acknowledge: Acknowledge) -> str:
    """A corpus of three groups; see `Job.run`."""
    settings = DreamBoothConfig(rank=2, steps=4, checkpoint_every=1)
    numbers = (5, 9, 4, 7, 8)

    def people(group: Sequence[int]) -> DreamBoothExamples:
        acknowledge(numbers.index(group[0]))
        return examples(group)

    config = CorpusConfig(base="tiny", group=2, dreambooth=settings)
    made = build_corpus(tiny_base(), numbers, people, config, folder / "corpus.safetensors")
    return fingerprint(list(made.identities), _factors(made.weights), dict(made.source))


def concept(folder: Path, acknowledge: Acknowledge) -> str:
    """Perfusion of one word, and its file; see `Job.run`."""
    base, text = tiny_base(), tiny_text()
    covariance = build_covariance(text, captions(60, "demo"), ridge=1e-2)
    task = prepare_task(base, text, covariance, [NewWord("<h1>", "hat")], ("a {}",), "tiny")
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    pictures = PictureExamples(noise, [["a <h1>", "the red <h1>"]] * 3)

    def watch(step: int, *_: object) -> None:
        acknowledge(step - 2)

    config = OftenSaved(steps=8, batch=2, evaluate_every=2)
    result = run_adaptation(PerfusionObjective(task, config), pictures, folder / "run", watch)
    path = folder / "concept.safetensors"
    write_adaptation(path, result.adaptations[0])
    return fingerprint(path.read_bytes().hex(), result.loss, result.step)


@dataclass(frozen=True)
class OftenSaved(PerfusionTraining):
    """Perfusion's settings, with a checkpoint after every second step."""

    @property
    def loop(self) -> LoopConfig:
        """The run."""
        return replace(super().loop, checkpoint_every=2)


def library(folder: Path, acknowledge: Acknowledge) -> str:
    """A library that grows by one person at a time; see `Job.run`."""
    path = folder / "people.safetensors"
    for number in range(_library_size(folder), PEOPLE):
        z = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(number))
        add_people(path, LoRALatent(z, "layout", "space"), [f"person {number}"])
        acknowledge(number + 1)
    made: Library = read_library(path)
    return fingerprint(made.latents.z, made.names)


def _steps(folder: Path) -> int:
    """Steps that a run's state holds."""
    path = folder / STATE
    if not path.exists():
        return 0
    return int(parse_json(read_header(path, "state").metadata["facts"], "facts")["step"])


def _groups(folder: Path) -> int:
    """People of a corpus that are trained."""
    if (folder / "corpus.safetensors").exists():
        return 5
    return 2 * len(list((folder / "corpus.safetensors.parts").glob("group-*.safetensors")))


def _library_size(folder: Path) -> int:
    """People of a library, the first of whom are those that it should hold."""
    path = folder / "people.safetensors"
    return len(read_library(path)) if path.exists() else 0


JOBS = {
    "loop": Job(loop, _steps),
    "DreamBooth": Job(dreambooth, _steps),
    "corpus": Job(corpus, _groups),
    "concept": Job(concept, lambda folder: _steps(folder / "run")),
    "library": Job(library, _library_size),
}


def examples(seeds: Sequence[int]) -> DreamBoothExamples:
    """Three pictures each of people who are their seeds."""
    latents = [
        torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    return DreamBoothExamples(torch.stack(latents), [["a", "b", "c"]] * len(seeds), tuple(seeds))


def _factors(weights: LoRAWeights) -> dict[str, list[Tensor]]:
    return {name: [layer.down, layer.up] for name, layer in weights.layers.items()}


def tiny_base() -> DiffusersBase:
    """A v-predicting base of SDXL's classes with random weights; frozen."""
    with DrawnFrom(torch.Generator().manual_seed(0)):
        unet = UNet2DConditionModel(
            sample_size=4, in_channels=4, out_channels=4, block_out_channels=[8],
            down_block_types=["CrossAttnDownBlock2D"], mid_block_type="UNetMidBlock2DCrossAttn",
            up_block_types=["CrossAttnUpBlock2D"], norm_num_groups=4, layers_per_block=1,
            cross_attention_dim=8, attention_head_dim=1, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=28,
        )  # fmt: skip
    unet.requires_grad_(False).eval()
    scheduler = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    return DiffusersBase(unet, None, _text, scheduler)


def _text(prompts: Sequence[str]) -> TextCondition:
    """Fixed random vectors for each prompt: context (B, 3, 8), pooled (B, 4)."""
    seeds = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in prompts]
    context = torch.stack([torch.randn(3, 8, generator=generator) for generator in seeds])
    return TextCondition(context, context[:, 0, :4])


@functools.cache
def tiny_text() -> TextEncoders:
    """Two tiny text encoders that can learn words."""
    config = CLIPTextConfig(
        **{**text_config(4), "num_attention_heads": 1, "projection_dim": 4},
        attn_implementation="eager",
    )
    with DrawnFrom(torch.Generator().manual_seed(1)):
        first, second = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    for module in (first, second):
        module.get_input_embeddings().weight.data.mul_(20)
        module.requires_grad_(False).eval()
    special = SpecialTokens(START, END, (END, PAD), UNKNOWN, LENGTH)
    return ClipPairText((first, second), word_numbers, special)


os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # of the server that children are forked from: they inherit no threads
