"""DreamBooth LoRA training of many identities in one batch over one frozen base model.

DreamBooth (arXiv:2208.12242) without prior preservation, on LoRA factors (arXiv:2106.09685).
Every identity has its own factors, random draws, gradient norm and Adam state, so that training
in a group gives what training alone gives, to rounding (ours).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.attach import attach
from ..adapters.lora import lora_adapter_set
from ..base_model.protocol import BaseModel, TextCondition
from ..diffusion.objective import stratified_timesteps
from ..errors import InterruptedTraining
from ..lora.weights import LoRAWeights
from .dreambooth_config import DreamBoothConfig, DreamBoothExamples
from .dreambooth_state import DreamBoothState, mixed_generator, starting_weights
from .losses import NoisedBatch

__all__ = ["DreamBoothConfig", "DreamBoothExamples", "train_dreambooth"]

Progress = Callable[[int, int, dict[str, float]], None]


def train_dreambooth(
    base: BaseModel,
    examples: DreamBoothExamples,
    config: DreamBoothConfig,
    progress: Progress | None = None,
    initial: LoRAWeights | None = None,
    shared_down: Mapping[str, Tensor] | None = None,
    folder: Path | None = None,
) -> dict[int, LoRAWeights]:
    """Train one LoRA for each of B people.

    Args:
        base: frozen base model; nothing in it changes.
        examples: pictures and captions.
        config: settings.
        progress: called after every step as (step, steps, metrics), `loss` being the mean over
            people; it may raise InterruptedTraining.
        initial: LoRA to start from, one for all or a batch of B; filled up to `config.rank`.
        shared_down: layer name to (r, in): `down` of everybody at the start (and at the end, if
            `train_down` is off). Without it everybody draws an own one, as LoRA does.
        folder: where an interrupted run keeps its state, to go on from exactly there.

    Returns:
        Step to batched weights, down (B, r, in), up (B, out, r), on the CPU; the last step is
        always there.

    Raises:
        InterruptedTraining: the run was stopped; with a folder the same call goes on.
        ConfigError: the loss is not a finite number, or arguments contradict each other.
        LayoutError: `initial` or `shared_down` do not fit the base model.
        CheckpointError: the folder holds the state of another run.
    """
    layout = base.layout("base", config.rank)
    start = starting_weights(layout, examples.seeds, config, initial, shared_down)
    state = DreamBoothState(start, base, config, examples)
    path = None if folder is None else folder / "dreambooth.safetensors"
    try:
        with attach(base.unet, lora_adapter_set(state.weights), names=layout.module_names):
            _run(state, _Source(base, examples, config), config, progress, path)
    except InterruptedTraining:
        if path is not None:
            state.save(path)
        raise
    if path is not None:
        path.unlink(missing_ok=True)
    return dict(sorted(state.kept.items()))


def _run(
    state: DreamBoothState,
    source: _Source,
    config: DreamBoothConfig,
    progress: Progress | None,
    path: Path | None,
) -> None:
    """Steps from where the checkpoint ends to the last one."""
    if path is not None:
        state.resume(path)
    while state.step < config.steps:
        loss = state.update(source.batch(state.step))
        if state.step in {*config.snapshots, config.steps}:
            state.keep()
        if progress is not None:
            progress(state.step, config.steps, {"loss": loss})
        if path is not None and state.step % config.checkpoint_every == 0:
            state.save(path)


class _Source:
    """Random draws of every person: pictures, timesteps, noise; a function of seeds and step."""

    def __init__(
        self, base: BaseModel, examples: DreamBoothExamples, config: DreamBoothConfig
    ) -> None:
        self.examples, self.config = examples, config
        weight = next(base.unet.parameters())
        self.device = weight.device
        self.train_steps = len(base.alphas_cumprod)
        prompts = [prompt for row in examples.prompts for prompt in row]
        unique = list(dict.fromkeys(prompts))
        text = base.encode_prompts(unique)
        self.text = TextCondition(text.context.to(weight), text.pooled.to(weight))
        number = {prompt: index for index, prompt in enumerate(unique)}
        self.caption = torch.tensor([[number[p] for p in row] for row in examples.prompts])

    def batch(self, step: int) -> NoisedBatch:
        """Samples of one step, sample-major: row k * B + b is sample k of person b."""
        draws = [self._draw(seed, step) for seed in self.examples.seeds]
        pictures, times, noise = (torch.stack(part, 1) for part in zip(*draws, strict=True))
        people = torch.arange(len(self.examples)).expand_as(pictures)  # m B
        latents = self.examples.latents[people, pictures].flatten(0, 1)
        return NoisedBatch(
            latents.to(self.device),
            noise.flatten(0, 1).to(self.device),
            times.flatten().to(self.device),
            self.text.select(self.caption[people, pictures].flatten().to(self.device)),
        )

    def _draw(self, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Picture numbers (m,), timesteps (m,), noise (m, C, h, w) of one person."""
        m, pictures = self.config.samples_per_step, self.examples.latents.shape[1]
        generator = mixed_generator(self.config.seed, seed, step + 1)
        rounds = [torch.randperm(pictures, generator=generator) for _ in range(-(-m // pictures))]
        times = stratified_timesteps(m, generator, self.train_steps)
        shape = (m, *self.examples.latents.shape[2:])
        dtype = torch.promote_types(self.examples.latents.dtype, torch.float32)
        return torch.cat(rounds)[:m], times, torch.randn(shape, generator=generator, dtype=dtype)
