"""Identities as material: blends, differences and steps between LoRA latents.

A normalised latent has zero mean over the training identities, so the zero vector is the average
person, the direction says who somebody is, and the length how far from the average. Slerp turns
the direction along the sphere and mixes the lengths: halfway between two people is a person as
distinct as they are, where the straight line would pass closer to the average.

In some spaces every token is a direction of its own, of unit length (`LoRALatent.unit_tokens`):
then each turns along its own sphere, and whatever leaves it is brought back to length 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, LayoutError, counted
from .lae.autoencoder import LoRALatent

SLERP, LINEAR = "slerp", "linear"
METHODS = (SLERP, LINEAR)

_SHORTEST = 1e-6  # below this length a latent is the average person and has no direction
_OPPOSITE = -1 + 1e-6  # below this cosine no shortest way round the sphere is defined
_ITERATIONS = 200
_CLOSE = 1e-10


def concatenate(latents: Sequence[LoRALatent]) -> LoRALatent:
    """All identities in one batch, in order.

    Raises:
        ConfigError: there is none.
        LayoutError: they come from different models.
    """
    check_one_space(latents)
    return replace(latents[0], z=torch.cat([_values(latent) for latent in latents]))


def select(latent: LoRALatent, index: int, count: int = 1) -> LoRALatent:
    """`count` identities of a batch, from number `index` (from 0).

    Raises:
        ConfigError: the batch does not hold them.
    """
    if index < 0 or count < 1 or index + count > len(latent):
        asked = f"are no identities {index} to {index + count - 1}"
        if count == 1:
            asked = f"is no identity number {index}"
        raise ConfigError(f"There {asked} here: the batch holds {len(latent)}, counted from 0.")
    return replace(latent, z=latent.z[index : index + count])


def blend(
    latents: Sequence[LoRALatent], weights: Sequence[float], method: str = SLERP
) -> LoRALatent:
    """Mixes identities by weights; a weight's share of the sum is that identity's share.

    Slerp of two is Shoemake's (1985); of more it is the weighted mean on the sphere (Buss and
    Fillmore, 2001), which two make the same. Opposite identities, and the average person, have no
    way round the sphere: they are mixed on the straight line.

    Args:
        latents: batches of one size, or of one identity, which then serves all.
        weights: one per latent, 0 or more; a latent of weight 0 does not count.
        method: `slerp` or `linear`.

    Raises:
        ConfigError: no identity, negative weights, weights that sum to zero, unknown method, or
            batches of different sizes.
        LayoutError: they come from different models.
    """
    check_one_space(latents)
    if method not in METHODS:
        raise ConfigError(f"Unknown way to blend {method!r}; use one of {', '.join(METHODS)}.")
    if len(weights) != len(latents):
        raise ConfigError(
            f"There are {counted(len(latents), 'identity')}, but {counted(len(weights), 'weight')}."
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ConfigError(f"The weights of a blend must be 0 or more; got {list(weights)}.")
    if sum(weights) == 0:
        raise ConfigError("The weights of the blend sum to zero: give one identity a weight.")
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    rows = [z for z, share in zip(_broadcast(latents), shares, strict=True) if share > 0]
    if len(rows) == 1:
        return replace(latents[0], z=rows[0])
    start, end = (1, 2) if latents[0].unit_tokens else (2, 3)
    points = torch.stack(rows).double().flatten(start, end)  # N B K*Dz, or N B*K Dz
    mixed = _mix(points, shares[shares > 0], method).view_as(rows[0])
    return _in_space(latents[0], mixed.float())


def interpolate(first: LoRALatent, last: LoRALatent, steps: int, method: str = SLERP) -> LoRALatent:
    """A batch of `steps` identities at equal distances from `first` to `last`, both included.

    Raises:
        ConfigError: fewer than 2 steps, or an end that is not one identity.
        LayoutError: they come from different models.
    """
    if steps < 2:
        raise ConfigError(f"The way from A to B has at least 2 steps, its ends; got {steps}.")
    if len(first) != 1 or len(last) != 1:
        raise ConfigError(
            f"Each end of the way is one identity, but A holds {len(first)} and B {len(last)}: "
            "choose one with Select Identity."
        )
    ways = [k / (steps - 1) for k in range(steps)]
    return concatenate([blend([first, last], [1 - way, way], method) for way in ways])


def add_difference(
    start: LoRALatent, plus: LoRALatent, minus: LoRALatent, amount: float
) -> LoRALatent:
    """start + amount (plus - minus): carries over what distinguishes one identity from another.

    Raises:
        ConfigError: the amount is not finite, or batches of different sizes.
        LayoutError: they come from different models.
    """
    check_one_space([start, plus, minus])
    if not math.isfinite(amount):
        raise ConfigError(f"The amount of the difference must be a number; got {amount}.")
    a, b, c = _broadcast([start, plus, minus])
    return _in_space(start, a + amount * (b - c))


def check_one_space(latents: Sequence[LoRALatent]) -> None:
    """Refuses latents that do not belong together.

    Raises:
        ConfigError: there is none.
        LayoutError: they come from models of different layouts, or from different models.
    """
    if not latents or min(len(latent) for latent in latents) == 0:
        raise ConfigError("There is no identity to work on: connect at least one.")
    layouts = {latent.layout_hash for latent in latents}
    shapes = {latent.z.shape[1:] for latent in latents}
    spaces = {latent.space for latent in latents} - {""}
    if len(layouts) > 1 or len(shapes) > 1 or len(spaces) > 1:
        raise LayoutError(
            "These identities were made by different DiffLoRA models and cannot be combined: make "
            "all of them with one model."
        )


def _in_space(like: LoRALatent, z: Tensor) -> LoRALatent:
    """z (B, K, Dz) as a latent like another one; tokens of unit length get that length back."""
    return replace(like, z=F.normalize(z, dim=-1) if like.unit_tokens else z)


def _values(latent: LoRALatent) -> Tensor:
    """z in float32 on the CPU, where identities of every origin meet."""
    return latent.z.detach().to("cpu", torch.float32)


def _broadcast(latents: Sequence[LoRALatent]) -> list[Tensor]:
    """Values of one batch size B."""
    sizes = {len(latent) for latent in latents} - {1}
    if len(sizes) > 1:
        raise ConfigError(
            f"The batches hold {', '.join(map(str, sorted(sizes)))} identities: give batches of "
            "one size, or single identities."
        )
    size = sizes.pop() if sizes else 1
    return [_values(latent).expand(size, -1, -1) for latent in latents]


def _mix(points: Tensor, shares: Tensor, method: str) -> Tensor:
    """Weighted mean of N points (N, B, n) with shares (N,): (B, n)."""
    straight = torch.einsum("n,nbd->bd", shares, points)
    if method == LINEAR:
        return straight
    lengths = points.norm(dim=-1)  # N B
    units = F.normalize(points, dim=-1)
    cosines = torch.einsum("nbd,mbd->nmb", units, units)
    round_about = (lengths > _SHORTEST).all(0) & (cosines > _OPPOSITE).all(0).all(0)
    direction = _spherical_mean(units, shares, F.normalize(straight, dim=-1))
    turned = direction * torch.einsum("n,nb->b", shares, lengths)[:, None]
    return torch.where(round_about[:, None], turned, straight)


def _spherical_mean(units: Tensor, shares: Tensor, mean: Tensor) -> Tensor:
    """Weighted mean (B, n) of unit vectors (N, B, n) by their angles, from a first guess."""
    for _ in range(_ITERATIONS):
        cosines = torch.einsum("nbd,bd->nb", units, mean).clamp(-1, 1)
        aside = units - cosines[..., None] * mean  # tangent at the mean, length sin(angle)
        sines = aside.norm(dim=-1)
        angles = torch.atan2(sines, cosines)
        tangents = aside * (angles / sines.clamp_min(_CLOSE))[..., None]
        step = torch.einsum("n,nbd->bd", shares, tangents)
        length = step.norm(dim=-1, keepdim=True)
        mean = F.normalize(length.cos() * mean + torch.sinc(length / math.pi) * step, dim=-1)
        if float(length.max()) < _CLOSE:
            break
    return mean
