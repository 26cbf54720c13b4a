"""LAE recipe: the LoRA autoencoder trained on the weights of a corpus (arXiv:2408.06740).

The paper's loss is a reconstruction term plus one that favours large weights; canonical form and
delta W terms are ours (difflora.md 3 and 6.1) and can each be switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import Config, check_ranges
from ...data.lora_rows import LoRARows
from ...errors import ConfigError
from ...lora.canonical import align_to, canonical
from ...lora.distance import squared_relative_error
from ...lora.statistics import WeightStatistics
from ...lora.weights import LoRALayer, LoRAWeights
from ...models.lae.autoencoder import LoRAAutoencoder
from ...models.lae.linear import LinearEncoder, LinearMirror
from ...models.lae.structured import MirrorEncoder, StructuredEncoder
from ...storage.atomic import write_text
from ..fingerprint import fingerprint
from ..loop import Hooks, LoopConfig, Progress, train
from ..losses import (
    angular_loss,
    kl_loss,
    preservation_weight,
    relative_delta_loss,
    weight_preserved_loss,
)
from . import lae_stream
from .lae_linear import fit_components

START_LOG_VARIANCE = -6.0


@dataclass(frozen=True)
class LAETrainConfig(Config):
    """Settings of the LAE recipe.

    Args:
        loop: the run, and how often to validate where validation LoRAs are given.
        batch: LoRAs per step.
        canonical: bring every LoRA to the canonical form and turn it towards the mean (ours). It
            matters when both factors are tokens; with a shared `down` there is no ambiguity left.
        preserve: strength of the weight-preserved term; 0 is plain MSE.
        preserve_power, preserve_cap: its shape, see `weight_preserved_loss`.
        angular: weight of 1 - cosine of delta W.
        relative: weight of the squared relative error of delta W.
        kl: weight of the latent's KL divergence.

    Raises:
        ConfigError: a value out of range.
    """

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=3000, ema=0.999))
    batch: int = 32
    canonical: bool = True
    preserve: float = 1.0
    preserve_power: float = 1.0
    preserve_cap: float = 10.0
    angular: float = 0.0
    relative: float = 0.0
    kl: float = 1e-4

    def __post_init__(self) -> None:
        numbers = (self.preserve, self.preserve_power, self.angular, self.relative, self.kl)
        if self.batch < 1 or self.preserve_cap <= 0 or min(numbers) < 0:
            raise ConfigError("LAE: the batch must be at least 1 and no weight may be negative.")
        weights = ("preserve", "preserve_power", "preserve_cap", "angular", "relative", "kl")
        check_ranges("LAE", self, 0, 1e6, *weights)


class LAEObjective(nn.Module):
    """Reconstruction loss of the autoencoder on raw tokens (B, T, L)."""

    def __init__(self, lae: LoRAAutoencoder, config: LAETrainConfig) -> None:
        super().__init__()
        self.lae, self.config = lae, config
        self.register_buffer("mask", lae.groups.grid.mask(), persistent=False)
        scale = torch.ones(len(lae.groups.slots), 1)
        for n in lae.groups.lengths:
            scale[list(lae.groups.members[n])] = lae.get_buffer(f"scale_{n}")
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of `tokens` (B, T, L) with posterior `noise` (B, K, Dz).

        `weight`, if given, is the mean preservation weight of a sample in the whole batch, of which
        this one may be a part.
        """
        c, target = self.config, batch["tokens"]
        mean, log_variance = self.lae.posterior(target)
        z = mean + (0.5 * log_variance).exp() * batch["noise"]
        weights = self.lae.decode_weights(z)
        estimate = self.lae.groups.grid.encode(weights)[0].float()
        mask, scale = self.get_buffer("mask"), self.get_buffer("scale")
        loss = weight_preserved_loss(
            estimate, target, mask, scale, c.preserve, c.preserve_power, c.preserve_cap
        )
        if "weight" in batch:
            loss = loss * (self.weight(target) / batch["weight"])  # 1 for a whole batch
        metrics = {"reconstruction": loss.detach()}
        if c.angular or c.relative:
            wanted = self.lae.groups.weights(self.lae.groups.split(target), self.lae.down_factors())
            fine = weights.to(torch.float32)
            loss = loss + c.angular * angular_loss(fine, wanted)
            loss = loss + c.relative * relative_delta_loss(fine, wanted)
        kl = kl_loss(mean.float(), log_variance.float())
        return loss + c.kl * kl, metrics | {"kl": kl.detach()}

    def weight(self, tokens: Tensor) -> Tensor:
        """Mean preservation weight of a sample of tokens (B, T, L), scalar."""
        c, mask = self.config, self.get_buffer("mask")
        omega = preservation_weight(
            tokens, mask.to(tokens.device), c.preserve, c.preserve_power, c.preserve_cap
        )
        return omega.sum() / len(tokens)


def standard_form(
    weights: LoRAWeights, rank: int, reference: LoRAWeights | None = None
) -> tuple[LoRAWeights, LoRAWeights]:
    """Canonical form of a batch, every LoRA turned towards one reference (difflora.md 6.1).

    Args:
        weights: batched LoRAs.
        rank: wanted rank.
        reference: of an earlier corpus; else the mean of this one, after two rounds of turning.

    Returns:
        The LoRAs, deltas unchanged, and the reference, which a new LoRA must be turned to as well.
    """
    form = canonical(weights, rank)
    if reference is not None:
        return align_to(form, reference), reference
    reference = form.batch_item(0)
    for _ in range(2):
        reference = _mean(align_to(form, reference))
    return align_to(form, reference), reference


def common_down(weights: LoRAWeights, rank: int) -> dict[str, Tensor]:
    """The rows that one shared `down` per layer should have: least squared error of delta W.

    They are the leading eigenvectors of sum_m delta_m^T delta_m, found without forming delta W. A
    corpus that was trained with one `down` is reproduced exactly.

    Args:
        weights: batched LoRAs.
        rank: rows wanted.

    Returns:
        Layer name to (rank, in), orthonormal.
    """
    rows = {}
    for name, layer in weights.folded().layers.items():
        up, down = layer.up.double(), layer.down.double()
        root = torch.linalg.qr(up)[1] @ down  # M r in: same delta^T delta as up @ down
        gram = torch.einsum("mri,mrj->ij", root, root)
        rows[name] = torch.linalg.eigh(gram)[1][:, -rank:].flip(1).mT.to(layer.down.dtype)
    return rows


def prepare(
    lae: LoRAAutoencoder, corpus: LoRAWeights, config: LAETrainConfig
) -> tuple[Tensor, LoRAWeights | None]:
    """Sets shared `down` and statistics of the autoencoder from a corpus.

    Args:
        lae: changed in place.
        corpus: batched LoRAs.
        config: settings.

    Returns:
        Raw tokens (M, T, L) of the corpus, and the reference of the canonical form, if used.
    """
    reference = None
    if lae.config.parts == ("up",):
        lae.set_shared_down(common_down(corpus, lae.layout.rank))
    elif config.canonical:
        corpus, reference = standard_form(corpus, lae.layout.rank)
    with torch.no_grad():
        tokens = lae.tokens(corpus).float()
    statistics = WeightStatistics.fit(tokens, lae.groups.grid.mask())
    lae.set_statistics(statistics.mean, statistics.scale)
    return tokens, reference


def fit(
    lae: LoRAAutoencoder,
    corpus: LoRAWeights | LoRARows,
    config: LAETrainConfig,
    folder: Path,
    validation: LoRAWeights | LoRARows | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train the autoencoder on a corpus; resumable, see `loop.train`.

    Args:
        lae: changed in place: shared `down`, statistics, weights.
        corpus: batched LoRAs of M identities; or those of a store, which are read as they are
            drawn, so that memory does not depend on how many there are.
        config: settings.
        folder: of checkpoints and log. The kind `linear` is fitted in closed form instead.
        validation: LoRAs of other identities; the weights of their lowest squared relative delta W
            error are kept.
        progress: as in `loop.train`.

    Returns:
        Metrics of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", config.to_json() + "\n")
    data: _Streamed | _InMemory
    if isinstance(corpus, LoRARows):
        data = _Streamed(lae, corpus, config)
    else:
        data = _InMemory(lae, corpus, config)
    if lae.config.kind == "linear":
        return _fit_linear(lae, data, validation)
    lae.shared_down.requires_grad_(False)
    _quiet_posterior(lae)
    objective = LAEObjective(lae, config)
    latent = (lae.config.latent_tokens, lae.config.latent_dim)

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(data.count, (config.batch,), generator=generator)
        tokens = data.tokens(rows)
        return {
            "tokens": tokens,
            "noise": torch.randn(config.batch, *latent, generator=generator),
            "weight": objective.weight(tokens),
        }

    hooks = Hooks(
        progress=progress,
        validate=_validation(lae, validation, data.reference),
        fingerprint=fingerprint(config, data.identity, _identity(validation)),
    )
    return train(objective, draw, config.loop, folder, hooks)


def _fit_linear(
    lae: LoRAAutoencoder, data: _InMemory | _Streamed, validation: LoRAWeights | LoRARows | None
) -> dict[str, float]:
    """The linear kind has no course: its components, and their error on other LoRAs."""
    figures = fit_components(lae, data.count, data.tokens)
    error = _validation(lae, validation, data.reference)
    return figures if error is None else figures | {"validation": error()}


class _InMemory:
    """Tokens of a corpus that is in memory, all made at once."""

    def __init__(self, lae: LoRAAutoencoder, corpus: LoRAWeights, config: LAETrainConfig) -> None:
        self.identity, self.reference = prepare(lae, corpus, config)
        self.count = len(self.identity)

    def tokens(self, rows: Tensor) -> Tensor:
        """(B, T, L) of rows (B,)."""
        return self.identity[rows]


class _Streamed:
    """Tokens of a store's LoRAs, made as they are drawn."""

    def __init__(self, lae: LoRAAutoencoder, corpus: LoRARows, config: LAETrainConfig) -> None:
        self.lae, self.corpus, self.identity = lae, corpus, corpus.digest
        self.count = len(corpus)
        self.device = next(lae.parameters()).device
        self.reference = lae_stream.prepare(lae, corpus, config.canonical, self.device)

    def tokens(self, rows: Tensor) -> Tensor:
        """(B, T, L) of rows (B,)."""
        weights = self.corpus.batch(rows.tolist()).to(device=self.device)
        return lae_stream.tokens(self.lae, weights, self.reference)


def _identity(validation: LoRAWeights | LoRARows | None) -> object:
    """What tells LoRAs from others."""
    return validation.digest if isinstance(validation, LoRARows) else validation


def _validation(
    lae: LoRAAutoencoder,
    weights: LoRAWeights | LoRARows | None,
    reference: LoRAWeights | None,
) -> Callable[[], float] | None:
    """Reconstruction error of other LoRAs, in the standard form of the corpus."""
    if weights is None:
        return None

    def turned(loras: LoRAWeights) -> LoRAWeights:
        return loras if reference is None else standard_form(loras, lae.layout.rank, reference)[0]

    if not isinstance(weights, LoRARows):
        whole = turned(weights)
        return lambda: reconstruction_error(lae, whole)

    def error() -> float:
        device, total = next(lae.parameters()).device, 0.0
        for part in weights.parts(lae_stream.AT_ONCE):
            loras = turned(part.to(device=device))
            total += reconstruction_error(lae, loras) * loras.batch_shape[0]
        return total / len(weights)

    return error


@torch.no_grad()
def reconstruction_error(lae: LoRAAutoencoder, weights: LoRAWeights) -> float:
    """Mean squared relative error of delta W after encoding and decoding a batch of LoRAs."""
    device = lae.get_buffer(f"scale_{lae.groups.lengths[0]}").device
    there = weights.to(torch.float32, device)
    back = lae.decode_weights(lae.encode_weights(there))
    return float(squared_relative_error(back, there).mean())


@torch.no_grad()
def _quiet_posterior(lae: LoRAAutoencoder) -> None:
    """Starts an untrained posterior at a small variance: unit noise would drown the latent."""
    encoder = lae.encoder
    if isinstance(encoder, (MirrorEncoder, LinearEncoder, LinearMirror)):
        return  # its variance is fixed, and small
    if isinstance(encoder, StructuredEncoder):
        last = "latent_out.bias"
    else:
        last = f"fold.{len(encoder.fold) - 1}.bias"
    bias = encoder.get_parameter(last)
    if not bool(bias.any()):
        bias[lae.config.latent_dim :] = START_LOG_VARIANCE


def _mean(weights: LoRAWeights) -> LoRAWeights:
    """Mean of the factors of a batch, as one LoRA."""
    return LoRAWeights(
        {
            name: LoRALayer(layer.down.mean(0), layer.up.mean(0), layer.alpha)
            for name, layer in weights.layers.items()
        }
    )
