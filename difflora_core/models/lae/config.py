"""Sizes of the LoRA weight autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

from ...config import Config, check_range
from ...errors import ConfigError

KINDS = ("structured", "conv1d", "linear")
ENCODERS = ("own", "mirror")


@dataclass(frozen=True)
class LAEConfig(Config):
    """Sizes of the autoencoder.

    Args:
        kind: `structured`, `conv1d` or `linear`.
        latent_tokens: K.
        latent_dim: Dz.
        parts: which factors are generated; `("up",)` with one shared `down` per layer, which
            removes the up/down ambiguity and halves the numbers, or `("down", "up")`.
        learn_down: train the shared `down` together with the rest.
        width: features inside the structured encoder.
        depth: its transformer blocks.
        heads: its attention heads.
        basis_size: basis vectors per token in the structured decoder.
        decoder_width: features of the structured decoder's trunk.
        decoder_depth: residual blocks of that trunk.
        conv_channels: channels inside the convolutions.
        conv_fold: stride of one convolution level.
        encoder: `own`, the one that goes with the kind, or `mirror` of the structured or linear
            decoder.

    Raises:
        ConfigError: a value out of range, or kinds that are unknown or do not fit together.
    """

    kind: str = "structured"
    latent_tokens: int = 8
    latent_dim: int = 16
    parts: tuple[str, ...] = ("up",)
    learn_down: bool = False
    width: int = 128
    depth: int = 2
    heads: int = 4
    basis_size: int = 64
    decoder_width: int = 192
    decoder_depth: int = 1
    conv_channels: int = 16
    conv_fold: int = 5
    encoder: str = "own"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"Unknown LAE kind {self.kind!r}; use one of {', '.join(KINDS)}.")
        mirrors = self.encoder == "mirror"
        if self.encoder not in ENCODERS or (mirrors and self.kind == "conv1d"):
            raise ConfigError(
                f"LAE: encoder {self.encoder!r} with kind {self.kind!r}; use `own`, or `mirror` "
                "with `structured` or `linear`."
            )
        for name in ("latent_tokens", "latent_dim", "width", "basis_size", "decoder_width"):
            check_range("LAE", name, getattr(self, name), 1, 16_384)
        check_range("LAE", "conv_channels", self.conv_channels, 1, 4096)
        check_range("LAE", "conv_fold", self.conv_fold, 2, 64)
        check_range("LAE", "depth", self.depth, 1, 64)
        check_range("LAE", "decoder_depth", self.decoder_depth, 0, 64)
        check_range("LAE", "heads", self.heads, 1, 256)
        if self.width % self.heads:
            raise ConfigError(f"LAE: width {self.width} cannot be split into {self.heads} heads.")
