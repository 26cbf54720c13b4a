"""DreamBooth LoRA training of many identities in one batch over one frozen base model.

DreamBooth (arXiv:2208.12242) without prior preservation, on LoRA factors (arXiv:2106.09685).
Every identity has its own factors, random draws, gradient norm and Adam state, so that training
in a group gives what training alone gives, to rounding (ours).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...adapters.attach import attach
from ...adapters.lora import lora_adapter_set
from ...base_model.protocol import BaseModel, TextCondition
from ...config import Config, check_range
from ...diffusion.objective import stratified_timesteps
from ...errors import CheckpointError
from ...lora.layout import edited_layers
from ...lora.weights import LoRALayer, LoRAWeights
from ..fingerprint import fingerprint, weights_digest
from ..loop import Batch, ByStep, Hooks, Progress, train
from ..losses import NoisedBatch, denoising_error
from ..processes import launched
from ..state_file import (
    RunIdentity,
    check_tensors,
    read_state,
    settings_that_count,
    write_state,
)
from .dreambooth_config import DreamBoothConfig, DreamBoothExamples
from .dreambooth_start import mixed_generator, starting_weights

__all__ = ["DreamBoothConfig", "DreamBoothExamples", "train_dreambooth"]


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
        folder: where the run keeps its state, to go on from exactly there; at its end too, where
            the same call returns the same again. The caller removes it (`state_file.remove_run`).

    Returns:
        Step to batched weights, down (B, r, in), up (B, out, r), on the CPU; also the last step's.

    Raises:
        InterruptedTraining: the run was stopped; with a folder the same call goes on.
        ConfigError: the loss is not a finite number, or arguments contradict each other.
        LayoutError: `initial` or `shared_down` do not fit the base model.
        CheckpointError: the folder holds another run's state, or cannot be written.
    """
    layout = base.layout("base", config.rank, edited_layers(config.targets, initial, shared_down))
    start = starting_weights(layout, examples.seeds, config, initial, shared_down)
    source = _Source(base, examples, config)
    fine = torch.promote_types(examples.latents.dtype, torch.float32)
    objective = DreamBoothObjective(base, start.to(fine, source.device), source.text, config)
    same = fingerprint(config, examples, _factors(start), weights_digest(base.unet))
    snapshots = _Snapshots(objective, folder, RunIdentity(same, settings_that_count(config)))
    hooks = Hooks(
        progress=progress,
        after_step=snapshots.after_step,
        scale_gradients=objective.scale_gradients,
        base=base,
        fingerprint=same,
        settings=(config,),
    )
    with attach(base.unet, lora_adapter_set(objective.weights), names=layout.module_names):
        train(objective, ByStep(source.batch), config.loop, folder, hooks, source.device)
    return snapshots.take_all()


class DreamBoothObjective(nn.Module):
    """Factors of B people; forward maps a batch of `_Source` to (loss, metrics).

    Args:
        base: the base model, with adapters of `weights` attached to its UNet.
        start: the factors before the first step, (B, r, in) and (B, out, r).
        text: all captions, encoded.
        config: settings.
    """

    def __init__(
        self, base: BaseModel, start: LoRAWeights, text: TextCondition, config: DreamBoothConfig
    ) -> None:
        super().__init__()
        self.base, self.text, self.config = base, text, config
        self.factors = nn.ParameterList()
        layers = {}
        for name, layer in start.layers.items():
            down, up = (nn.Parameter(p.detach().clone()) for p in (layer.down, layer.up))
            down.requires_grad_(config.train_down)
            self.factors.extend([down, up])
            layers[name] = LoRALayer(down, up, layer.alpha)
        self.weights = LoRAWeights(layers)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum () over people of their mean losses (`loss` among the metrics is the mean).

        A batch holds m draws for each of B people: scaled `latents` and `noise` (m, B, C, h, w),
        `timesteps` (m, B), `captions` (m, B), rows of the encoded captions, and perhaps `time_ids`
        (m, B, 6). The sum, because a person's gradient must not depend on the size of the group.
        """
        people = batch["captions"].shape[1]
        flat = {name: part.flatten(0, 1) for name, part in batch.items()}  # m B ... -> mB ...
        text = replace(self.text.select(flat["captions"]), time_ids=flat.get("time_ids"))
        noised = NoisedBatch(flat["latents"], flat["noise"], flat["timesteps"], text)
        error = denoising_error(self.base, noised, self.config.loss_weighting)
        losses = error.unflatten(0, (-1, people)).mean(0)  # B
        return losses.sum(), {"loss": losses.detach().mean()}

    @torch.no_grad()
    def scale_gradients(self) -> None:
        """Scale each person's gradient by its own norm over all layers."""
        trained = [p for p in self.factors if p.grad is not None]
        gradients = [p.grad for p in trained if p.grad is not None]
        norm = torch.stack([g.square().sum((1, 2)) for g in gradients]).sum(0).sqrt()  # B
        if self.config.normalise_gradient:
            scale = 1 / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        elif self.config.clip:
            scale = self.config.clip / norm.clamp_min(self.config.clip)
        else:
            return
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient * scale[:, None, None]

    def copy(self) -> LoRAWeights:
        """The weights as they are now, on the CPU."""
        return LoRAWeights(
            {
                name: LoRALayer(
                    layer.down.detach().cpu().clone(), layer.up.detach().cpu().clone(), layer.alpha
                )
                for name, layer in self.weights.layers.items()
            }
        )


@dataclass(frozen=True)
class SnapshotFacts(Config):
    """The step of a snapshot.

    Raises:
        ConfigError: it is none.
    """

    step: int

    def __post_init__(self) -> None:
        check_range("Snapshot", "step", self.step, 1, 10_000_000)


class _Snapshots:
    """Copies of the weights after some steps; on disk too, where a run has a folder."""

    def __init__(
        self, objective: DreamBoothObjective, run: Path | None, identity: RunIdentity
    ) -> None:
        self.objective, self.run, self.identity = objective, run, identity
        self.steps = {*objective.config.snapshots, objective.config.steps}
        self.kept: dict[int, LoRAWeights] = {}

    def after_step(self, step: int) -> None:
        """Keep the weights of a step that is asked for."""
        if step in self.steps:
            self.kept[step] = self.objective.copy()
            if self.run is not None and launched().is_main:
                tensors = _factors(self.kept[step])
                write_state(_snapshot(self.run, step), tensors, SnapshotFacts(step), self.identity)

    def take_all(self) -> dict[int, LoRAWeights]:
        """All of them, those from before a stop read from disk."""
        run = self.run
        if run is not None:
            launched().together(lambda: self._read_missing(run))
        return dict(sorted(self.kept.items()))

    def _read_missing(self, run: Path) -> None:
        for step in self.steps - self.kept.keys():
            self.kept[step] = self._read(_snapshot(run, step), step)

    def _read(self, path: Path, step: int) -> LoRAWeights:
        """The weights of a step that a run before this one left."""
        try:
            tensors, facts = read_state(path, self.identity, SnapshotFacts)
            check_tensors(path, tensors, _factors(self.objective.weights))
            if facts.step != step:
                raise CheckpointError(f"{path} holds the weights of step {facts.step}.")
        except CheckpointError as error:
            raise CheckpointError(
                f"The weights after step {step} are lost: delete {path.parent} to train them "
                f"anew. ({error})"
            ) from error
        layers = self.objective.weights.layers
        return LoRAWeights(
            {
                name: LoRALayer(tensors[f"down.{name}"], tensors[f"up.{name}"], layer.alpha)
                for name, layer in layers.items()
            }
        )


def _snapshot(run: Path, step: int) -> Path:
    return run / f"snapshot-{step}.safetensors"


def _factors(weights: LoRAWeights) -> dict[str, Tensor]:
    """Factors under the names of a snapshot file."""
    return {
        f"{part}.{name}": tensor
        for name, layer in weights.layers.items()
        for part, tensor in (("down", layer.down), ("up", layer.up))
    }


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
        rows = [torch.tensor([number[p] for p in row]) for row in examples.prompts]
        self.caption = pad_sequence(rows, batch_first=True)  # B M

    def batch(self, step: int) -> dict[str, Any]:
        """Samples of one step: entry (k, b) of every tensor (m, B, ...) is sample k of person b."""
        draws = [self._draw(row, step) for row in range(len(self.examples))]
        pictures, times, noise = (torch.stack(part, 1) for part in zip(*draws, strict=True))
        people = torch.arange(len(self.examples)).expand_as(pictures)  # m B
        batch = {
            "latents": self.examples.latents[people, pictures],
            "noise": noise,
            "timesteps": times,
            "captions": self.caption[people, pictures],
        }
        if self.examples.time_ids is not None:
            batch["time_ids"] = self.examples.time_ids[people, pictures]
        return batch

    def _draw(self, row: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Picture numbers (m,), timesteps (m,), noise (m, C, h, w) of one person."""
        m, pictures = self.config.samples_per_step, len(self.examples.prompts[row])
        generator = mixed_generator(self.config.seed, self.examples.seeds[row], step + 1)
        rounds = [torch.randperm(pictures, generator=generator) for _ in range(-(-m // pictures))]
        times = stratified_timesteps(m, generator, self.train_steps)
        shape = (m, *self.examples.latents.shape[2:])
        dtype = torch.promote_types(self.examples.latents.dtype, torch.float32)
        return torch.cat(rounds)[:m], times, torch.randn(shape, generator=generator, dtype=dtype)
