"""The LAE encoder in closed form: an encoded LoRA lands where its person's latent is known to be.

So existing LoRAs enter the latent space of a decoder that was itself trained through the base
model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigError
from ...lora.statistics import WeightStatistics
from ...lora.weights import LoRAWeights
from ...models.lae.autoencoder import LoRAAutoencoder
from ...models.lae.structured import MirrorEncoder, StructuredDecoder
from .linear_baselines import best_ridge

MIRROR_RIDGES = tuple(10.0**k for k in range(-3, 5))


@dataclass(frozen=True, eq=False)
class EncoderExamples:
    """People with their LoRA and the latent where they belong.

    Args:
        weights: B LoRAs, batched.
        latents: (B, K, Dz) raw latents, for instance the mean prediction from their photos.

    Raises:
        ConfigError: the counts differ.
    """

    weights: LoRAWeights
    latents: Tensor

    def __post_init__(self) -> None:
        counts = {len(self.latents), *self.weights.batch_shape}
        if len(counts) != 1:
            raise ConfigError(f"LoRAs and latents are of different people: {counts}.")


@torch.no_grad()
def adopt_statistics(lae: LoRAAutoencoder, tokens: Tensor) -> None:
    """Gives the encoder the statistics of a corpus without changing what any latent decodes to.

    A decoder that was trained through the base model kept mean 0 and scale 1, but the encoder needs
    inputs of unit size. For the structured decoder the change is exact:

        mean + scale * (offset + c @ basis) = mean' + scale' * (offset' + c @ basis')

    The conv1d decoder cannot absorb it and is left alone.

    Args:
        lae: changed in place.
        tokens: (M, T, L) raw tokens of the corpus.
    """
    decoder = lae.decoder
    if not isinstance(decoder, StructuredDecoder):
        return
    lengths = lae.groups.lengths
    before = [
        (lae.get_buffer(f"mean_{n}").clone(), lae.get_buffer(f"scale_{n}").clone()) for n in lengths
    ]
    statistics = WeightStatistics.fit(tokens, lae.groups.grid.mask())
    lae.set_statistics(statistics.mean, statistics.scale)
    for n, (mean, scale) in zip(lengths, before, strict=True):
        new_mean, new_scale = lae.get_buffer(f"mean_{n}"), lae.get_buffer(f"scale_{n}")
        offset, basis = decoder.offset[str(n)], decoder.basis[str(n)]
        offset.copy_((mean + scale * offset - new_mean) / new_scale)
        basis.mul_((scale / new_scale)[..., None])


@torch.no_grad()
def fit_mirror(
    lae: LoRAAutoencoder, examples: EncoderExamples, validation: EncoderExamples
) -> dict[str, float]:
    """Fit a mirror encoder in closed form: ridge regression from readings to known latents.

    Args:
        lae: with `encoder="mirror"` and a trained decoder; changed in place.
        examples: people of the corpus.
        validation: other people; they choose the strength of the ridge.

    Returns:
        `ridge`, the chosen strength, and `unexplained`, the share of the validation latents'
        variance that the encoder misses.

    Raises:
        ConfigError: another encoder.
    """
    if not isinstance(lae.encoder, MirrorEncoder) or not isinstance(lae.decoder, StructuredDecoder):
        raise ConfigError("Only a mirror encoder can be fitted in closed form.")
    tokens = [lae.tokens(people.weights).float() for people in (examples, validation)]
    adopt_statistics(lae, tokens[0])
    readings = [lae.decoder.readings(lae.normalise(values)).double() for values in tokens]
    latents = [z.double().flatten(1) for z in (examples.latents, validation.latents)]
    ridge, strength = best_ridge(
        (readings[0], latents[0]), (readings[1], latents[1]), MIRROR_RIDGES
    )
    weight = ridge.weight / ridge.spread[:, None]
    lae.encoder.mean_out.weight.copy_(weight.mT)
    lae.encoder.mean_out.bias.copy_(ridge.bias - ridge.mean @ weight)
    missed = (ridge.predict(readings[1]) - latents[1]).square().mean()
    return {"ridge": strength, "unexplained": float(missed / latents[1].var(0).mean())}
