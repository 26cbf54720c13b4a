"""`plan`: what training a model will take, before anything is started."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from ..config import Config, check_range
from ..errors import ConfigError, percent
from ..lora.layout import TARGETS, LoRALayout, layout_from_unet_config
from ..models.difflora import DiffLoRAModel
from ..training.difflora.lae import LAETrainConfig
from ..training.difflora.latent_dit import LatentDiTConfig
from ..vision.features import FeatureSizes
from .bases import unet_config
from .counting import StepCount, count_step
from .machine import Machine, machine
from .networks import network_config
from .progress import duration

VIT_L = FeatureSizes(512, 768, 257, 1024)
DEMO = FeatureSizes(128, 64, 65, 128)
LATENT_CHANNELS = {"demo": 8}
LOOKING = 0.15
"""Seconds in which one process opens a photo and finds and reads its faces (ours, one core)."""
PICTURE_BYTES = 0.3
"""Of a JPEG file for each pixel."""
ENCODER_OPERATIONS = 4.5e6
"""Of SDXL's VAE encoder for each pixel."""
DREAMBOOTH_STEPS = 500
LAE, DIT = LAETrainConfig(), LatentDiTConfig()
"""The courses on weights alone that `train` takes unless told otherwise."""
RESERVED = 1.5e9
"""Bytes that CUDA, its libraries and the allocator's gaps take."""
PROTOCOL = (25, 30, 30)
"""People, prompts and steps of `evaluate`'s protocol; guidance asks twice a step."""
GENERATOR_STEPS = 30
"""Of `multiply`'s generator, with guidance."""
DRAWN_BYTES = 2.0
"""Of a PNG file for each pixel."""


@dataclass(frozen=True)
class Settings(Config):
    """Says what each stage will take: time, memory, disk; refuses what cannot fit.

    The operations and bytes are counted on the real networks; how fast the machine is is a measured
    number (inspect FILE --measure) or that of a known GPU.

    Args:
        people: how many.
        pictures: of each.
        gpu: rtx3060, rtx4090, a100, h100, h200, or a file that inspect --measure wrote.
        gpus: how many of them.
        method: functional, paper or both.
        drawn: how many of each person's pictures a generator has to draw first (multiply).
        loras: where those of paper come from: trained here, or given: a teacher's, a collection's.
        base: sdxl or demo.
        resolution: side of the pictures in pixels.
        rank: of the LoRAs.
        targets: layers that they edit, see `train`.
        batch: people in a step of functional, over all GPUs.
        accumulate: parts of a batch on each GPU.
        steps: of functional.
        checkpointing: compute the base's layers again instead of keeping what they made.
        ema_on_cpu: keep the running average in the computer's memory.
        host_gb: memory of the computer that a GPU is in.
        workers: processes that open photos, over all machines.
        shard: each of several GPUs keeps a part of what is trained (FSDP).
    """

    people: int
    pictures: int
    gpu: str = "rtx4090"
    gpus: int = 1
    method: Literal["functional", "paper", "both"] = "functional"
    drawn: int = 0
    loras: Literal["trained", "given"] = "trained"
    base: Literal["sdxl", "demo"] = "sdxl"
    resolution: int = 1024
    rank: int = 8
    targets: Literal["attention", "transformer"] = "attention"
    batch: int = 8
    accumulate: int = 8
    steps: int = 20_000
    checkpointing: bool = True
    ema_on_cpu: bool = False
    host_gb: float = 64.0
    workers: int = 8
    shard: bool = False

    def __post_init__(self) -> None:
        self.check_choices("plan")
        for name in ("people", "gpus", "batch", "accumulate", "steps", "workers"):
            check_range("plan", name, getattr(self, name), 1, 10**12)
        check_range("plan", "pictures", self.pictures, 1, 10**9)
        check_range("plan", "drawn", self.drawn, 0, self.pictures)
        check_range("plan", "resolution", self.resolution, 64, 8192)
        check_range("plan", "rank", self.rank, 1, 256)
        check_range("plan", "host_gb", self.host_gb, 0.1, 1e6)
        if self.batch % (self.gpus * self.accumulate):
            raise ConfigError(
                f"A batch of {self.batch} cannot be shared evenly by {self.gpus} x "
                f"{self.accumulate} parts (gpus times accumulate): choose a multiple."
            )


@dataclass(frozen=True)
class Stage:
    """What a stage takes: seconds, bytes of a GPU's memory, bytes on disk."""

    name: str
    seconds: float
    memory: float
    disk: float


def run(settings: Settings, console: Console) -> None:
    """Prints a table, and what breaks first.

    Raises:
        ConfigError: a stage does not fit; the message names the settings that would.
    """
    here = machine(settings.gpu)
    counts = Counts.of(settings)
    table = Table(title=f"{settings.gpus} x {here.name}, {settings.people:,} people")
    for column in ("stage", "time", "GPU memory", "disk"):
        table.add_column(column)
    stages = stages_of(settings, counts, here)
    for stage in stages:
        memory, disk = (f"{n / 1e9:.3g} GB" if n else "–" for n in (stage.memory, stage.disk))
        table.add_row(stage.name, duration(stage.seconds), memory, disk)
    console.print(table)
    console.print(
        f"counted: {counts.step.parameters / 1e6:,.0f} M numbers in the base, "
        f"{counts.model / 1e6:,.0f} M in the model, {counts.trained / 1e6:,.0f} M of them trained; "
        f"{counts.step.operations(settings.checkpointing) / 1e12:.3g} TFLOP a sample"
    )
    for name, share in strains(settings, counts, here):
        told = " — breaks" if share > 1 else ""
        console.print(f"{name}: {percent(share)} of what there is{told}")
    check_fits(settings, counts, here)


@dataclass(frozen=True)
class Counts:
    """What is counted of the networks.

    Attributes:
        step: of the base.
        layout: of the LoRAs.
        model: numbers of the DiffLoRA model.
        trained: those of them that functional trains.
        dit: those of the DiT and MIF, which the second stage of paper trains.
        lae: those of the autoencoder.
        tokens: of the latent that the DiT makes.
        picture: bytes of one picture in the computer's memory while training.
    """

    step: StepCount
    layout: LoRALayout
    model: int
    trained: int
    dit: int
    lae: int
    tokens: int
    picture: int

    @staticmethod
    def of(settings: Settings) -> Counts:
        """Counts the networks that settings ask for, without making them."""
        config = unet_config(settings.base)
        targets = TARGETS[settings.targets]
        layout = layout_from_unet_config(settings.base, config, settings.rank, targets)
        scale = 8 if settings.base == "sdxl" else 4
        side = settings.resolution // scale
        sizes = VIT_L if settings.base == "sdxl" else DEMO
        with torch.device("meta"):
            network = DiffLoRAModel(network_config(sizes, settings.base == "sdxl"), layout)
        parts = {name: _numbers(part) for name, part in network.named_children()}
        network.dit.requires_grad_(False)  # as `FunctionalObjective` does
        network.lae.encoder.requires_grad_(False)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        latent = LATENT_CHANNELS.get(settings.base, 4) * side**2
        picture = 2 * latent + 2 * sizes.tokens * sizes.token_dim + 4 * (sizes.face + sizes.image)
        step = count_step(config, layout, side, side)
        dit, tokens = parts["dit"] + parts["mif"], network.config.lae.latent_tokens
        rest = (trained, dit, parts["lae"], tokens, picture)
        return Counts(step, layout, _numbers(network), *rest)


def stages_of(settings: Settings, counts: Counts, here: Machine) -> list[Stage]:
    """Every stage of a method, in order."""
    s, speed = settings, here.tflops * 1e12 * settings.gpus
    pictures, pixels = s.people * s.pictures, s.resolution**2
    stored = pictures * pixels * PICTURE_BYTES
    encoded = pictures * counts.picture
    writing = here.disk_mb_s * 1e6
    drawing = 2 * counts.step.forward  # a step with guidance
    drawer = 2 * counts.step.parameters + RESERVED + counts.step.largest
    found = []
    if s.drawn:
        drawn = s.people * s.drawn
        work = drawn * GENERATOR_STEPS * drawing
        found.append(Stage("multiply", work / speed, drawer, drawn * pixels * DRAWN_BYTES))
    found += [
        Stage("prepare", pictures * LOOKING / s.workers + stored / writing, 0, stored),
        Stage("encode", pictures * pixels * ENCODER_OPERATIONS / speed, RESERVED + 3e9, encoded),
    ]
    if s.method != "paper":
        work = s.steps * s.batch * counts.step.operations(s.checkpointing)
        work += s.steps * s.batch * 6 * counts.trained
        state = 16 * counts.model  # a checkpoint: weights, average, two moments
        found.append(Stage("functional", work / speed, functional_memory(s, counts), state))
    if s.method != "functional":
        found.append(_corpus(s, counts, here))
        found.append(_autoencoder(s, counts, here))
    found.append(_weights_only("DiT", DIT.loop.steps * DIT.batch * counts.tokens, counts.dit, here))
    people, prompts, steps = PROTOCOL
    asked, disk = people * prompts * steps * drawing, people * prompts * pixels * DRAWN_BYTES
    found.append(Stage("evaluate", asked / speed, drawer, disk))
    return found


def _corpus(settings: Settings, counts: Counts, here: Machine) -> Stage:
    """LoRAs of everybody: trained, or read in half precision and written in full."""
    people, lora = settings.people, counts.layout.numel
    disk = 4.0 * people * lora
    if settings.loras == "given":
        return Stage("corpus", 1.5 * disk / (here.disk_mb_s * 1e6), 0, disk)
    work = people * DREAMBOOTH_STEPS * counts.step.operations(settings.checkpointing)
    memory = _base_memory(settings, counts) + 16 * lora
    return Stage("corpus", work / (here.tflops * 1e12 * settings.gpus), memory, disk)


def functional_memory(settings: Settings, counts: Counts) -> float:
    """Bytes of a GPU in a step of functional: all that is held at its worst moment."""
    each = max(1, settings.batch // (settings.gpus * settings.accumulate))
    average = 0 if settings.ema_on_cpu else 4
    kept: float = 4 + 4 + 8 + average  # values, gradients, two moments, average
    if settings.shard and settings.gpus > 1:
        kept = 4 + 4 + kept / settings.gpus  # and values and gradients whole while it computes
    weights = kept * counts.trained
    weights += 4 * (counts.model - counts.trained)
    lora = 12 * counts.layout.numel * each  # a LoRA each: values, gradients, and one more
    return _base_memory(settings, counts, each) + weights + lora


def _base_memory(settings: Settings, counts: Counts, each: int = 1) -> float:
    """Bytes of the frozen base in half precision and of what a step of it holds."""
    held = counts.step.activations(settings.checkpointing)
    return 2 * counts.step.parameters + RESERVED + each * held


def _autoencoder(settings: Settings, counts: Counts, here: Machine) -> Stage:
    """The LAE, whose LoRAs are read once where the computer can remember them, else every time."""
    lora, uses = 4.0 * counts.layout.numel, LAE.loop.steps * LAE.batch
    remembered = settings.people * lora < settings.host_gb * 1e9 / 2
    reading = (settings.people if remembered else uses) * lora / (here.disk_mb_s * 1e6)
    found = _weights_only("LAE", uses, counts.lae, here)
    held = 4 * LAE.batch * lora  # tokens, what is decoded, and the gradients of both
    return replace(found, seconds=found.seconds + reading, memory=found.memory + held)


def _weights_only(name: str, uses: int, trained: int, here: Machine) -> Stage:
    """A stage that trains on weights alone, on one GPU; each number is used so many times."""
    work = 6.0 * uses * trained
    return Stage(name, work / (here.tflops * 1e12), RESERVED + 20 * trained, 16.0 * trained)


def strains(settings: Settings, counts: Counts, here: Machine) -> list[tuple[str, float]]:
    """What is used of what there is, the most strained first: above 1 it breaks."""
    s = settings
    samples = max(1.0, s.batch / s.gpus)
    computing = samples * counts.step.operations(s.checkpointing) / (here.tflops * 1e12)
    sending = 2 * 4 * counts.trained / (here.link_gb_s * 1e9) if s.gpus > 1 else 0.0
    found = {
        "pictures' latents and features in the computer's memory": s.people
        * s.pictures
        * counts.picture
        / (s.host_gb * 1e9),
        "sending gradients over computing them": sending / computing,
        "opening photos, in weeks": s.people * s.pictures * LOOKING / s.workers / 604_800,
    }
    if s.method != "paper":
        share = functional_memory(s, counts) / (here.memory_gb * 1e9)
        found["the functional step in the GPU's memory"] = share
    return sorted(found.items(), key=lambda pair: -pair[1])


def check_fits(settings: Settings, counts: Counts, here: Machine) -> None:
    """Refuses what does not fit, and names settings that do.

    Raises:
        ConfigError: a stage needs more memory than the GPU has.
    """
    room = here.memory_gb * 1e9
    worst = max(stages_of(settings, counts, here), key=lambda stage: stage.memory)
    if worst.memory <= room:
        return
    raise ConfigError(
        f"{worst.name} needs {worst.memory / 1e9:.1f} GB and {here.name} has {room / 1e9:.1f}. "
        + _remedy(settings, counts, here)
    )


def _remedy(settings: Settings, counts: Counts, here: Machine) -> str:
    """The first settings that fit, from the mildest on."""
    share = max(1, settings.batch // settings.gpus)
    changes: list[dict[str, Any]] = [
        {"checkpointing": True},
        {"checkpointing": True, "accumulate": share},
        {"checkpointing": True, "accumulate": share, "ema_on_cpu": True},
        {"checkpointing": True, "accumulate": share, "shard": settings.gpus > 1},
    ]
    for change in changes:
        other = replace(settings, **change)
        stages = stages_of(other, counts, here)
        if max(stage.memory for stage in stages) <= here.memory_gb * 1e9:
            words = " ".join(_option(name, value) for name, value in change.items())
            return f"With {words} it fits."
    return "No setting makes it fit: take a GPU with more memory."


def _option(name: str, value: object) -> str:
    """A setting as it stands on a command line."""
    dashed = f"--{name.replace('_', '-')}"
    return dashed if value is True else f"{dashed} {value}"


def _numbers(part: torch.nn.Module) -> int:
    """Parameters of a network."""
    return sum(p.numel() for p in part.parameters())
