"""LAE: the LoRA weight autoencoder, between the tokens of one LoRA and a short latent.

Source: DiffLoRA (arXiv:2408.06740): an autoencoder with 1-D convolutions that compresses a LoRA
nearly 300 times. Its layers are not public. Three encoder/decoder pairs stand behind one class:
`conv1d` (the paper's), `structured` (ours) and `linear` (principal components); the latter two
may also have an encoder that mirrors the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, LayoutError
from ...lora.layout import LoRALayout
from ...lora.weights import LoRALayer, LoRAWeights
from ..layers import LOG_VARIANCE_FLOOR
from .config import LAEConfig
from .conv1d import Conv1dDecoder, Conv1dEncoder
from .linear import LinearDecoder, LinearEncoder, LinearMirror
from .structured import MirrorEncoder, StructuredDecoder, StructuredEncoder
from .tokens import TokenGroups


@dataclass(frozen=True)
class LoRALatent:
    """A LoRA in the latent space.

    Args:
        z: (B, K, Dz), normalised: zero mean and unit spread over the training identities, or
            tokens of unit length.
        layout_hash: hash of the LoRA layout it decodes to.
        space: `IdentityModel.latent_space` of the model that made it; empty when not known.
        unit_tokens: each token is a direction of its own, of length 1, and blends by itself.
        license: terms that bind what is made of it, see `IdentityModel.license`.
    """

    z: Tensor
    layout_hash: str
    space: str = ""
    unit_tokens: bool = False
    license: str = ""

    def __len__(self) -> int:
        return self.z.shape[0]


class LoRAAutoencoder(nn.Module):
    """Autoencoder of LoRA weights for one layout, with statistics and shared `down` inside.

    Before training `decode_weights` gives LoRA with delta W = 0 exactly, whatever the latent; the
    decoder still receives a gradient, as LoRA itself does with its zero `up`.

    Args:
        config: sizes.
        layout: the LoRA layout.
        operations: namespace of layer classes.
        generator: draws the initial weights.
    """

    def __init__(
        self,
        config: LAEConfig,
        layout: LoRALayout,
        operations: Any = nn,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        self.groups = groups = TokenGroups(layout, config.parts)
        self.encoder: (
            StructuredEncoder | Conv1dEncoder | LinearEncoder | MirrorEncoder | LinearMirror
        )
        self.decoder: StructuredDecoder | Conv1dDecoder | LinearDecoder
        if config.kind == "structured":
            if config.encoder == "mirror":
                self.encoder = MirrorEncoder(config, groups, operations)
            else:
                self.encoder = StructuredEncoder(config, groups, operations, generator)
            self.decoder = StructuredDecoder(config, groups, operations, generator)
        elif config.kind == "linear":
            if config.encoder == "mirror":
                self.encoder = LinearMirror(config)
            else:
                self.encoder = LinearEncoder(config, groups, operations)
            self.decoder = LinearDecoder(config, groups, operations)
        else:
            self.encoder = Conv1dEncoder(config, groups, operations, generator)
            self.decoder = Conv1dDecoder(config, groups, operations, generator)
        for n in groups.lengths:
            count = len(groups.members[n])
            self.register_buffer(f"mean_{n}", torch.zeros(count, n))
            self.register_buffer(f"scale_{n}", torch.ones(count, 1))
        self.shared_down = random_down(layout, config.learn_down, generator)
        if config.parts == ("down", "up"):
            # an all-zero LoRA has no gradient: the mean `down` starts random, as LoRA's own does
            self._start_mean(self.down_factors())
            self.shared_down = nn.ParameterDict()

    def posterior(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Gaussian posterior of raw tokens (B, T, L): mean and log variance, (B, K, Dz) each."""
        seen, mirrors = self.normalise(tokens), self.config.encoder == "mirror"  # B T L
        if mirrors and isinstance(self.decoder, LinearDecoder):
            seen = self.decoder.readings(seen, self.spread())  # B K*Dz
        elif mirrors and isinstance(self.decoder, StructuredDecoder):
            seen = self.decoder.readings(seen)  # B T*Kb
        mean, log_variance = self.encoder(seen).chunk(2, dim=-1)  # of B K 2Dz
        return mean, log_variance.clamp(LOG_VARIANCE_FLOOR, 4.0)

    def encode(self, tokens: Tensor) -> Tensor:
        """Encodes raw tokens (B, T, L) to the posterior mean z (B, K, Dz)."""
        return self.posterior(tokens)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Decodes z (B, K, Dz) to raw tokens (B, T, L), padding zero."""
        return self.groups.join(self._decode_groups(z))

    def encode_weights(self, weights: LoRAWeights) -> Tensor:
        """Encodes LoRA weights, batched or single, to z (B, K, Dz).

        Raises:
            LayoutError: the weights belong to another layout.
        """
        return self.encode(self.tokens(weights))

    def decode_weights(self, z: Tensor) -> LoRAWeights:
        """Decodes z (B, K, Dz) to batched weights: down (B, r, in), up (B, out, r)."""
        return self.groups.weights(self._decode_groups(z), self.down_factors())

    def tokens(self, weights: LoRAWeights) -> Tensor:
        """Turns weights into raw tokens (B, T, L), with alpha folded into `up`.

        With a shared `down` each layer is first projected onto it: the least-squares `up` is
        up * down * pinv(shared down), exact when the LoRA was trained with that `down`.
        """
        shared = self.down_factors()
        if shared:
            self.layout.check(weights)
            weights = LoRAWeights({name: project(weights[name], shared[name]) for name in weights})
        return self.groups.grid.encode(weights)[0]

    def normalise(self, tokens: Tensor) -> Tensor:
        """Raw tokens (B, T, L) minus the stored mean, over the stored scale; padding stays zero."""
        groups = self.groups.split(tokens)  # B T_g L_g
        pairs = zip(groups, self._statistics(tokens), strict=True)
        return self.groups.join([(g - mean) / scale for g, (mean, scale) in pairs])

    def spread(self) -> Tensor:
        """The stored scale of every value, (P,) in the order of `TokenGroups.flatten`."""
        scales = [self.get_buffer(f"scale_{n}").expand(-1, n)[None] for n in self.groups.lengths]
        return self.groups.flatten(self.groups.join(scales))[0]

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, scale: Tensor) -> None:
        """Stores the statistics of a LoRA corpus.

        Args:
            mean: (T, L) mean of raw tokens.
            scale: (T,) positive spread of each token.

        Raises:
            ConfigError: wrong shapes or a scale that is not positive.
        """
        count = len(self.groups.slots)
        if mean.shape != (count, self.groups.longest) or scale.shape != (count,):
            raise ConfigError(
                f"LAE statistics have shapes {tuple(mean.shape)} and {tuple(scale.shape)}; "
                f"expected {(count, self.groups.longest)} and {(count,)}."
            )
        if not bool((scale > 0).all()):
            raise ConfigError("LAE statistics: every scale must be positive.")
        for n, value in zip(self.groups.lengths, self.groups.split(mean[None]), strict=True):
            self.get_buffer(f"mean_{n}").copy_(value[0])
            self.get_buffer(f"scale_{n}").copy_(scale[list(self.groups.members[n])][:, None])

    def down_factors(self) -> dict[str, Tensor]:
        """Shared `down` (r, in) by layer name; empty when both factors are generated."""
        if not len(self.shared_down):
            return {}
        rows: dict[str, int] = {}
        factors = {}
        for shape in self.layout.layers:
            key = str(shape.in_features)
            factors[shape.name] = self.shared_down[key][rows.get(key, 0)]
            rows[key] = rows.get(key, 0) + 1
        return factors

    @torch.no_grad()
    def set_shared_down(self, factors: Mapping[str, Tensor]) -> None:
        """Replaces the shared `down` of every layer.

        Args:
            factors: layer name to (r, in).

        Raises:
            LayoutError: layers or shapes do not fit the layout, or the model has no shared down.
        """
        own = self.down_factors()
        if not own or set(own) != set(factors):
            raise LayoutError("The shared down factors do not name the layers of this model.")
        for name, target in own.items():
            if factors[name].shape != target.shape:
                raise LayoutError(
                    f"Shared down of {name} has shape {tuple(factors[name].shape)}; "
                    f"expected {tuple(target.shape)}."
                )
            target.copy_(factors[name])

    @torch.no_grad()
    def _start_mean(self, factors: Mapping[str, Tensor]) -> None:
        """Puts the given `down` factors into the stored mean."""
        for n in self.groups.lengths:
            for row, t in zip(self.get_buffer(f"mean_{n}"), self.groups.members[n], strict=True):
                if self.groups.slots[t].part == "down" and not row.is_meta:
                    row.copy_(factors[self.groups.slots[t].layer].flatten())

    def _statistics(self, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean (T_g, L_g) and scale (T_g, 1) per group, in the dtype and device of `like`."""
        names = self.groups.lengths
        return [
            (self.get_buffer(f"mean_{n}").to(like), self.get_buffer(f"scale_{n}").to(like))
            for n in names
        ]

    def _decode_groups(self, z: Tensor) -> list[Tensor]:
        """Raw values of every group, (B, T_g, L_g)."""
        expected = (self.config.latent_tokens, self.config.latent_dim)
        if tuple(z.shape[1:]) != expected:
            raise LayoutError(
                f"The LoRA latent has size {tuple(z.shape[1:])}; this model decodes {expected}."
            )
        return self.decoder(z, self._statistics(z))


def project(layer: LoRALayer, shared: Tensor) -> LoRALayer:
    """Least-squares fit of a layer's delta W by `up @ shared`, with `shared` (r, in)."""
    inverse = torch.linalg.pinv(shared.detach().float()).to(layer.down)  # in r
    up = layer.scaling * layer.up @ (layer.down @ inverse)  # ... out r
    down = shared.to(layer.down).expand(*layer.batch_shape, -1, -1)  # ... r in
    return LoRALayer(down, up, float(layer.rank))


def random_down(
    layout: LoRALayout, learned: bool, generator: torch.Generator | None
) -> nn.ParameterDict:
    """Row-orthonormal random `down` per layer, stacked by input size: (layers, r, in)."""
    stacks = nn.ParameterDict()
    for size in sorted({shape.in_features for shape in layout.layers}):
        count = sum(shape.in_features == size for shape in layout.layers)
        value = torch.empty(count, layout.rank, size)
        if not value.is_meta:
            value.normal_(generator=generator)
            if size >= layout.rank:
                value = torch.linalg.qr(value.mT)[0].mT.contiguous()
        stacks[str(size)] = nn.Parameter(value, requires_grad=learned)
    return stacks
