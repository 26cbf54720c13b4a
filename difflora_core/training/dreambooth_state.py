"""What a DreamBooth run changes: the factors of a group of people, their optimiser, snapshots."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..base_model.protocol import BaseModel
from ..errors import CheckpointError, ConfigError, LayoutError
from ..lora.layout import LoRALayout
from ..lora.weights import LoRALayer, LoRAWeights
from ..storage.safetensors_io import write_atomic
from .dreambooth_config import DreamBoothConfig, DreamBoothExamples
from .losses import NoisedBatch, denoising_error


class DreamBoothState:
    """Factors of B people, their optimiser, and the snapshots so far."""

    def __init__(
        self,
        start: LoRAWeights,
        base: BaseModel,
        config: DreamBoothConfig,
        examples: DreamBoothExamples,
    ) -> None:
        self.base, self.config, self.people = base, config, len(examples)
        device = next(base.unet.parameters()).device
        dtype = torch.promote_types(examples.latents.dtype, torch.float32)
        layers = {}
        for name, layer in start.layers.items():
            down, up = (part.to(device, dtype).clone() for part in (layer.down, layer.up))
            down.requires_grad_(config.train_down)
            layers[name] = LoRALayer(down, up.requires_grad_(), layer.alpha)
        self.weights = LoRAWeights(layers)
        factors = [part for layer in layers.values() for part in (layer.down, layer.up)]
        self.trained = [part for part in factors if part.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
        )
        self.step = 0
        self.kept: dict[int, LoRAWeights] = {}
        facts = [config.to_dict(), list(examples.seeds), examples.prompts]
        facts.append([*examples.latents.shape, float(examples.latents.double().sum())])
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def update(self, batch: NoisedBatch) -> float:
        """One optimiser step; returns the mean loss."""
        bf16 = self.config.precision == "bf16"
        kind = batch.latents.device.type
        with torch.autocast(kind, torch.bfloat16) if bf16 else nullcontext():
            error = denoising_error(self.base, batch, self.config.loss_weighting)
        losses = error.unflatten(0, (-1, self.people)).mean(0)  # B
        if not bool(torch.isfinite(losses).all()):
            raise ConfigError(
                f"DreamBooth: the loss is no longer a number at step {self.step + 1}; lower "
                "learning_rate, or look for damaged training pictures."
            )
        # the sum, not the mean: a person's gradient must not depend on the size of the group
        gradients = torch.autograd.grad(losses.sum(), self.trained)
        scale = self._gradient_scale(gradients)
        for factor, gradient in zip(self.trained, gradients, strict=True):
            factor.grad = gradient * scale[:, None, None]
        self.optimizer.param_groups[0]["lr"] = self.config.rate(self.step)
        self.optimizer.step()
        self.step += 1
        return float(losses.detach().mean())

    def _gradient_scale(self, gradients: Sequence[Tensor]) -> Tensor:
        """Factor (B,) on each person's gradient."""
        norm = torch.stack([g.square().sum((1, 2)) for g in gradients]).sum(0).sqrt()
        if self.config.normalise_gradient:
            return 1 / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        if self.config.clip:
            return self.config.clip / norm.clamp_min(self.config.clip)
        return torch.ones_like(norm)

    def keep(self) -> None:
        """Remember a copy of the weights."""
        self.kept[self.step] = _copy(self.weights)

    def save(self, path: Path) -> None:
        """Write everything that a later call needs."""
        tensors = {}
        for index, factor in enumerate(self.trained):
            tensors[f"factor.{index}"] = factor.detach().cpu()
            for key, value in self.optimizer.state[factor].items():
                tensors[f"adam.{index}.{key}"] = torch.as_tensor(value).cpu()
        for kept, weights in self.kept.items():
            for name, layer in weights.layers.items():
                tensors[f"kept.{kept}.down.{name}"] = layer.down
                tensors[f"kept.{kept}.up.{name}"] = layer.up
        facts = {"step": str(self.step), "fingerprint": self.fingerprint}
        write_atomic({k: t.contiguous() for k, t in tensors.items()}, facts, path)

    def resume(self, path: Path) -> None:
        """Read what `save` wrote, if there is a file."""
        if not path.exists():
            return
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
                facts = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged; delete it to start anew.") from error
        if facts.get("fingerprint") != self.fingerprint:
            raise CheckpointError(
                f"{path} belongs to a run with other settings or pictures; move it away."
            )
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, *rest = key.split(".", 2)
            if kind == "factor":
                self.trained[int(rest[0])].detach().copy_(tensor)
            elif kind == "adam":
                state.setdefault(int(rest[0]), {})[rest[1]] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        for step in {int(key.split(".", 2)[1]) for key in tensors if key.startswith("kept.")}:
            parts = {
                name: (tensors[f"kept.{step}.down.{name}"], tensors[f"kept.{step}.up.{name}"])
                for name in self.weights
            }
            self.kept[step] = LoRAWeights(
                {name: LoRALayer(*pair, float(self.config.rank)) for name, pair in parts.items()}
            )
        self.step = int(facts["step"])


def _copy(weights: LoRAWeights) -> LoRAWeights:
    """Detached copy on the CPU."""
    return LoRAWeights(
        {
            name: LoRALayer(
                layer.down.detach().cpu().clone(), layer.up.detach().cpu().clone(), layer.alpha
            )
            for name, layer in weights.layers.items()
        }
    )


def mixed_generator(*numbers: int) -> torch.Generator:
    """CPU generator seeded by several integers."""
    text = ",".join(str(int(number)) for number in numbers)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def starting_weights(
    layout: LoRALayout,
    seeds: Sequence[int],
    config: DreamBoothConfig,
    initial: LoRAWeights | None,
    shared_down: Mapping[str, Tensor] | None,
) -> LoRAWeights:
    """Weights before the first step, one row per person."""
    if initial is not None and shared_down is not None:
        raise ConfigError("DreamBooth starts from a LoRA or from a shared down, not from both.")
    random = _random_down(layout, seeds, config.seed)
    if initial is not None:
        return _grown(initial, layout, random)
    layers = {}
    for shape in layout:
        down = random[shape.name]
        if shared_down is not None:
            shared = shared_down.get(shape.name)
            if shared is None or shared.shape != down.shape[1:]:
                raise LayoutError(
                    f"The shared down factor of {shape.name} must be {tuple(down.shape[1:])}, got "
                    f"{None if shared is None else tuple(shared.shape)}."
                )
            down = shared.detach().expand(len(seeds), -1, -1)
        up = torch.zeros(len(seeds), shape.out_features, layout.rank, dtype=down.dtype)
        layers[shape.name] = LoRALayer(down, up.to(down.device), float(layout.rank))
    return LoRAWeights(layers)


def _random_down(layout: LoRALayout, seeds: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Stock LoRA's start, uniform within 1 / sqrt(in): layer name to (B, r, in)."""
    generators = [mixed_generator(seed, own, 0) for own in seeds]
    return {
        shape.name: torch.stack(
            [torch.rand(layout.rank, shape.in_features, generator=g) * 2 - 1 for g in generators]
        )
        / math.sqrt(shape.in_features)
        for shape in layout
    }


def _grown(initial: LoRAWeights, layout: LoRALayout, random: Mapping[str, Tensor]) -> LoRAWeights:
    """`initial` as a batch at the layout's rank: new components have a random down and a zero up.

    Raises:
        LayoutError: other layers, a higher rank, or a batch of another size.
    """
    people = len(next(iter(random.values())))
    layers = {}
    for shape in layout:
        if shape.name not in initial.layers:
            raise LayoutError(f"The LoRA to start from has no layer {shape.name}.")
        own = initial[shape.name].folded()
        extra = layout.rank - own.rank
        if extra < 0 or own.batch_shape not in (torch.Size(), (people,)):
            raise LayoutError(
                f"The LoRA to start from has rank {own.rank} and batch {tuple(own.batch_shape)}; "
                f"at most rank {layout.rank} and one LoRA, or one for each of {people} people."
            )
        down = own.down.expand(people, -1, -1)
        fill = random[shape.name][:, own.rank :].to(down)
        up = F.pad(own.up.expand(people, -1, -1), (0, extra))
        layers[shape.name] = LoRALayer(torch.cat([down, fill], 1), up, float(layout.rank))
    return LoRAWeights(layers)
