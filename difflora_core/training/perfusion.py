"""The Perfusion recipe: a new word, its direction, and its value in every cross-attention layer.

arXiv 2305.01644, section 4. Trained are the word's embedding in each text encoder and o* of the
value path; keys are locked to the super-class word; i* is a moving average of the word's encoding,
through which gradients pass straight. Text encoders and UNet stay frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.attach import attach
from ..adapters.base import AdapterSet
from ..adapters.perfusion import PerfusionKeyAdapter
from ..adapters.token_gate import ConceptMatcher
from ..base_model.protocol import TextCondition
from ..config import check_range
from ..diffusion.objective import loss_weight
from ..errors import ConfigError
from ..methods.base import Facts, TrainedAdaptation
from ..methods.perfusion import Perfusion, PerfusionConfig, key_and_value_adapters, key_layer
from ..text.covariance import normalised
from ..text.encoders import EncodedPrompts, WordEmbedding
from .adaptation_run import AdaptationTraining
from .calibration import AttentionRecord, binding_loss, record_attention, separation_loss
from .concept_task import ConceptTask, learned_words
from .loop import LoopConfig
from .losses import NoisedBatch, check_guidance, denoise


@dataclass(frozen=True)
class PerfusionTraining(AdaptationTraining):
    """Settings of the recipe; the numbers are those of perfusion.md 4, but for `average`.

    `value_rate`, `word_rate`: learning rates of o* and of the embeddings. `average`: decay of i*;
    with the usual 0.99 it lags 100 steps behind a moving embedding, whose similarity may then run
    away from 1 (measured). `bias`, `temperature`: gate while training. `binding`, `separation`:
    weights of DisenDiff's losses (arXiv 2403.18551 takes 0.01 for both), for several words from
    one picture. `preservation`: weight of staying, outside the masks, at what the base draws for
    the super-class word (ours). `reach`: tokens from the word on which it acts while training, -1
    for all. `guidance`: see `losses.under_guidance`; 1 is the plain loss. The rest: see
    `AdaptationTraining`.
    """

    value_rate: float = 0.03
    word_rate: float = 0.006
    average: float = 0.9
    bias: float = 0.75
    temperature: float = 0.1
    binding: float = 0.0
    separation: float = 0.0
    preservation: float = 0.15
    reach: int = -1
    guidance: float = 1.0

    def __post_init__(self) -> None:
        self.while_training()
        super().__post_init__()
        if not (0 < self.value_rate <= 10 and 0 <= self.word_rate <= 10):
            raise ConfigError(
                "Learning rates must lie in 0 to 10, and that of the values above 0; got "
                f"{self.value_rate} for the values and {self.word_rate} for the words."
            )
        if not 0 <= self.average < 1:
            raise ConfigError(f"average must lie in 0 to 1, got {self.average}.")
        for name in ("binding", "separation", "preservation"):
            check_range("Perfusion", name, getattr(self, name), 0, 1000)
        check_guidance(self.guidance)

    def while_training(self) -> PerfusionConfig:
        """How the words act while they are trained."""
        return PerfusionConfig(self.bias, self.temperature, reach=self.reach)

    @property
    def loop(self) -> LoopConfig:
        """The run."""
        return self.course(self.value_rate)


class PerfusionObjective(nn.Module):
    """The trained numbers of J words; forward maps a batch to (loss, metrics).

    Before training it answers like the super-class word, weakened by the gate's value at a = 1.

    Args:
        task: the frozen setting. config: the recipe.

    Raises:
        ConfigError: separation is asked for one word.
    """

    name: ClassVar[str] = Perfusion.name
    Config: ClassVar[type[PerfusionTraining]] = PerfusionTraining
    direction: Tensor

    def __init__(self, task: ConceptTask, config: PerfusionTraining) -> None:
        super().__init__()
        if config.separation and len(task.words) < 2:
            raise ConfigError(
                "Attention maps can be kept apart for two words or more; this is one."
            )
        self.task, self.config = task, config
        starts = [task.layer_output(path, task.superclasses) for path in task.layers.values()]
        self.starts = dict(zip(task.layers, starts, strict=True))
        self.values = nn.ParameterList(torch.zeros_like(start) for start in starts)
        # A shift of an embedding is stored in units of the ratio of the two learning rates, so
        # that one optimiser gives both: AdamW moves by the rate whatever the gradient's size.
        self.shifts = nn.ParameterList(
            torch.zeros(len(task.words), len(vector)) for vector in task.embeddings[0]
        )
        self.shifts.requires_grad_(config.word_rate > 0)
        # Changes in the forward pass; as a buffer it is averaged over processes and checkpointed.
        self.register_buffer("direction", task.superclasses.clone().float())
        self.register_buffer("inverse", task.covariance.inverse.float(), persistent=False)

    def embeddings(self) -> dict[str, WordEmbedding]:
        """Word to its embeddings; gradients flow."""
        unit = self.config.word_rate / self.config.value_rate
        return {
            word.word: tuple(
                vector.to(shift) + unit * shift[row]
                for vector, shift in zip(self.task.embeddings[row], self.shifts, strict=True)
            )
            for row, word in enumerate(self.task.words)
        }

    def directions(self, encoded: EncodedPrompts) -> Tensor:
        """i* (J, d): updates the average and lets gradients pass to the encodings."""
        rows = []
        for row, word in enumerate(self.task.words):
            seen = encoded.at(word.word).to(self.direction)
            if not len(seen):
                rows.append(self.direction[row].detach().clone())
                continue
            mean = seen.mean(0)
            if self.training:
                with torch.no_grad():
                    self.direction[row].lerp_(mean, 1 - self.config.average)
            rows.append(self.direction[row].detach().clone() + mean - mean.detach())
        return torch.stack(rows)

    def adapters(self, directions: Tensor) -> AdapterSet:
        """Adapters of one step for directions (J, d); o* is W_V i_super plus what was learned."""
        duals = directions @ self.get_buffer("inverse").to(directions)  # J d
        superclasses = self.task.superclasses.to(directions)
        rows = zip(directions, normalised(duals, directions), superclasses, strict=True)
        acting = self.config.while_training()
        matcher = ConceptMatcher([acting.gated(vectors) for vectors in rows])
        targets = {
            layer: self.starts[layer].to(value) + value
            for layer, value in zip(self.task.layers, self.values, strict=True)
        }
        return key_and_value_adapters(matcher, targets, (PerfusionKeyAdapter(matcher), 1.0))

    def prepare(self, prompts: Sequence[str]) -> tuple[EncodedPrompts, AdapterSet]:
        """Encoded prompts, context (B, L, d), and the adapters that belong to them."""
        encoded = self.task.text.encode(prompts, self.embeddings())
        return encoded, self.adapters(self.directions(encoded))

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Masked denoising loss () (perfusion.md 3), plus the losses that are on.

        The batch is one of `PictureExamples.draw`. i* is a mean over the whole of it, so every part
        encodes all its prompts.
        """
        own = tuple(batch["prompts"])
        whole = tuple(batch.get("whole", own))
        everything, adapters = self.prepare(whole)
        encoded = everything if own == whole else everything.select([*map(whole.index, own)])
        noised = self.task.noised(batch, encoded, self.config.guidance)
        base, names = self.task.base, self.module_names
        calibrated = self.config.binding > 0 or self.config.separation > 0
        keys = [path for name, path in names.items() if name.endswith("to_k")] if calibrated else []
        with attach(base.unet, adapters, names=names), record_attention(base.unet, keys) as record:
            made = denoise(base, noised, batch.get("masks"))
        weight = loss_weight(self.config.weighting, made.abar, base.prediction_type)
        loss = (made.error * weight).mean()
        parts: dict[str, Tensor] = {}
        if calibrated:
            size = (batch["latents"].shape[-2], batch["latents"].shape[-1])
            extra, parts = self._calibration(record, encoded, everything, whole, size)
            loss = loss + extra
        if self.config.preservation and "masks" in batch:
            drift = self._drift(made.estimate, noised, batch)
            loss = loss + self.config.preservation * drift
            parts["drift"] = drift.detach()
        return loss, parts

    def _drift(self, estimate: Tensor, noised: NoisedBatch, batch: Mapping[str, Any]) -> Tensor:
        """Squared change outside the masks, where the masked loss lets a concept spread."""
        words = zip(self.task.words, self.task.embeddings, strict=True)
        with torch.no_grad():
            encoded = self.task.text.encode(batch["prompts"], {w.word: e for w, e in words})
            text = TextCondition(encoded.context, encoded.pooled)
            plain = denoise(self.task.base, replace(noised, text=text)).estimate
        outside = 1 - batch["masks"].to(estimate)[:, None]
        return (outside * (estimate - plain)).square().mean()

    @property
    def module_names(self) -> dict[str, str]:
        """Layer name to module path of keys and values."""
        values = self.task.layers
        return {**values, **{key_layer(n): key_layer(p) for n, p in values.items()}}

    def _calibration(
        self,
        record: AttentionRecord,
        encoded: EncodedPrompts,
        everything: EncodedPrompts,
        prompts: Sequence[str],
        size: tuple[int, int],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """DisenDiff's two losses over the prompts of the whole batch that hold every word.

        The class word is the token after the new word where the prompt says so ("<v1> cat"),
        else the new word stands for its class and there is nothing to bind.
        """
        words, device = self.task.words, self.direction.device
        places = torch.stack([encoded.positions[word.word] for word in words])  # J B
        here = (places >= 0).all(0).to(device)
        all_places = torch.stack([everything.positions[word.word] for word in words])
        count = int((all_places >= 0).all(0).sum())
        if not count:
            return self.direction.new_zeros(()), {}
        share = len(prompts) / (count * len(here))  # the mean over parts is the mean over prompts
        follows = [all(f"{w.word} {w.superclass}" in p for p in prompts) for w in words]
        own = [record.maps(row.to(device), size) for row in places]
        classes = [
            record.maps((row + 1).to(device), size) if paired else map_
            for row, paired, map_ in zip(places, follows, own, strict=True)
        ]
        bind = separate = own[0].new_zeros(())
        if self.config.binding and any(follows):
            pairs = [(o, c) for o, c, paired in zip(own, classes, follows, strict=True) if paired]
            losses = binding_loss([o for o, _ in pairs], [c for _, c in pairs])
            bind = losses[here].sum() * share
        if self.config.separation:
            separate = separation_loss(classes)[here].sum() * share
        total = self.config.binding * bind + self.config.separation * separate
        return total, {"binding": bind.detach(), "separation": separate.detach()}

    @torch.no_grad()
    def adaptations(self, facts: Facts) -> list[TrainedAdaptation]:
        """What was trained so far, one record for each word."""
        task, result = self.task, []
        embeddings = [self.embeddings()[word.word] for word in task.words]
        for row, word in enumerate(learned_words(task, embeddings)):
            direction = self.direction[row].detach().cpu().double()
            covector = task.covariance.covector(direction)
            shared = {"direction": direction.float(), "covector": covector.float()}
            layers = {
                layer: {"values": (self.starts[layer][row].to(v) + v[row]).detach().cpu().clone()}
                for layer, v in zip(task.layers, self.values, strict=True)
            }
            settings = PerfusionConfig(reach=self.config.reach)
            result.append(
                TrainedAdaptation(
                    self.name, task.base_name, settings, shared, layers, word=word, facts=facts
                )
            )
        return result


RECIPE = PerfusionObjective
