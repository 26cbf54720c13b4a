"""The linear autoencoder in closed form: principal components of a corpus of any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import ConfigError, counted
from ...models.lae.autoencoder import LoRAAutoencoder
from ...models.lae.linear import LinearDecoder, LinearEncoder
from .linear_baselines import leading

AT_ONCE = 64
"""LoRAs of a block: products of two blocks make up the matrix of inner products."""


@torch.no_grad()
def fit_components(
    lae: LoRAAutoencoder, count: int, tokens: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Sets encoder and decoder to the principal components of a corpus.

    The components are those of raw tokens, so the squared error of the weights is the least that
    so many numbers allow. They come from the LoRAs' inner products, in float64.

    Args:
        lae: of kind `linear`, with its statistics; changed in place.
        count: M, LoRAs in the corpus.
        tokens: from rows (B,) to raw tokens (B, T, L).

    Returns:
        `kept`, the share of the corpus's variation that its latents keep.

    Raises:
        ConfigError: another kind, or too few LoRAs for so many numbers.
    """
    encoder, decoder = lae.encoder, lae.decoder
    if not isinstance(decoder, LinearDecoder):
        raise ConfigError("Only a linear autoencoder can be fitted in closed form.")
    size = lae.config.latent_tokens * lae.config.latent_dim
    if size >= count:
        raise ConfigError(
            f"A corpus of {counted(count, 'LoRA')} differs in {count - 1} directions at most; a "
            f"linear autoencoder of {size} numbers needs {size + 1} LoRAs. Take a smaller latent."
        )
    blocks = torch.arange(count).split(AT_ONCE)
    spread = lae.spread().double()

    def centred(rows: Tensor) -> Tensor:
        """Raw values minus their mean, (B, P)."""
        return lae.groups.flatten(lae.normalise(tokens(rows))).double() * spread

    products = _inner_products(blocks, centred)
    values, vectors = leading(products, size)
    directions = torch.zeros(size, lae.groups.numel, dtype=torch.float64, device=spread.device)
    for block in blocks:
        directions += vectors[block].mT.to(spread.device) @ centred(block)
    directions /= directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    if isinstance(encoder, LinearEncoder):
        encoder.get_parameter("mean_out.weight").copy_(directions * spread)
    decoder.get_parameter("directions.weight").copy_((directions / spread).mT)
    return {"kept": float(values.sum() / products.diagonal().sum())}


def _inner_products(blocks: Sequence[Tensor], rows: Callable[[Tensor], Tensor]) -> Tensor:
    """Of all pairs of LoRAs, (M, M): two blocks of them are in memory at once."""
    count = int(blocks[-1][-1]) + 1
    products = torch.zeros(count, count, dtype=torch.float64)
    for block in blocks:
        own = rows(block)
        for other in blocks:
            if other[0] <= block[0]:
                part = own @ rows(other).mT
                products[block[0] : block[-1] + 1, other[0] : other[-1] + 1] = part.cpu()
    return products.tril() + products.tril(-1).mT
