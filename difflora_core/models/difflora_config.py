"""DiffLoRAConfig: the settings of a whole DiffLoRA model, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..diffusion.objective import NoiseSchedule
from ..errors import ConfigError
from ..vision.features import FeatureSizes
from .dit import DiTConfig
from .lae.config import LAEConfig
from .mif import MIFConfig
from .predictor import PredictorConfig

PRESETS = ("functional", "paper")

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class DiffLoRAConfig(Config):
    """Configuration of a whole DiffLoRA model.

    Args:
        mif: condition network.
        predictor: best-guess path from condition to latent.
        dit: denoiser.
        lae: autoencoder.
        schedule: noise schedule of the latent diffusion.
        preset: how it was trained; `functional` (through the base model's denoising loss) or
            `paper` (two stages on weights alone). It decides what the best guess is: what the
            predictor makes, or the mean of what the DiT samples.
        face_encoder: which face recogniser it was trained with, in words.
        image_encoder: which CLIP vision it was trained with, in words.

    Raises:
        ConfigError: unknown preset, or networks whose sizes do not meet.
    """

    mif: MIFConfig = field(default_factory=MIFConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    lae: LAEConfig = field(default_factory=LAEConfig)
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    preset: str = "functional"
    face_encoder: str = ""
    image_encoder: str = ""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"Unknown preset {self.preset!r}; use one of {', '.join(PRESETS)}.")
        condition = (self.mif.width, self.mif.condition_tokens)
        latent = (self.lae.latent_tokens, self.lae.latent_dim)
        for name, part in (("predictor", self.predictor), ("dit", self.dit)):
            if (part.condition_dim, part.condition_tokens) != condition:
                raise ConfigError(
                    f"The {name} expects a condition of size "
                    f"{(part.condition_dim, part.condition_tokens)}, but MIF makes {condition}."
                )
            if (part.latent_tokens, part.latent_dim) != latent:
                raise ConfigError(
                    f"The {name} makes latents of size {(part.latent_tokens, part.latent_dim)}, "
                    f"but the LAE decodes {latent}."
                )

    @property
    def feature_sizes(self) -> FeatureSizes:
        """Sizes of the encoders that the model was trained with."""
        m = self.mif
        return FeatureSizes(m.face_dim, m.image_dim, m.image_token_count, m.token_dim)

    @classmethod
    def build(
        cls, mif: MIFConfig, predictor: PredictorConfig, dit: DiTConfig, lae: LAEConfig, **rest: Any
    ) -> Self:
        """Fills the sizes in which neighbours must agree from `mif` and `lae`."""
        shared = {
            "condition_dim": mif.width,
            "condition_tokens": mif.condition_tokens,
            "latent_tokens": lae.latent_tokens,
            "latent_dim": lae.latent_dim,
        }
        return cls(
            mif=mif,
            predictor=PredictorConfig(**(predictor.to_dict() | shared)),
            dit=DiTConfig(**(dit.to_dict() | shared)),
            lae=lae,
            **rest,
        )

    @classmethod
    def demo(cls, sizes: FeatureSizes, **rest: Any) -> Self:
        """The demo world's model: latent 8 x 16, trains on a CPU in minutes.

        Args:
            sizes: what the demo encoders give.
            rest: further fields; a field given here (for example `lae`) replaces the preset's.
        """
        mif = rest.pop("mif", None) or MIFConfig(
            face_dim=sizes.face,
            image_dim=sizes.image,
            token_dim=sizes.token_dim,
            image_token_count=sizes.tokens,
        )
        return cls.build(
            mif,
            rest.pop("predictor", None) or PredictorConfig(),
            rest.pop("dit", None) or DiTConfig(mlp_ratio=2.0),
            rest.pop("lae", None) or LAEConfig(),
            **rest,
        )

    @classmethod
    def sdxl(cls, **rest: Any) -> Self:
        """Full size for SDXL at rank 8: ArcFace 512, CLIP ViT-L/14 at 224, latent 64 x 64.

        With `sdxl_layout(8)`: 64 basis vectors per layer = 341 M numbers, the DiT 308 M, all in all
        822 M, 1.65 GB in half precision.
        """
        lae = LAEConfig(
            latent_tokens=64,
            latent_dim=64,
            width=512,
            depth=6,
            heads=8,
            basis_size=64,
            decoder_width=1024,
            decoder_depth=4,
        )
        mif = MIFConfig(width=1024, tokens=16, depth=4, heads=16)
        return cls.build(
            mif, PredictorConfig(width=1024, depth=4), DiTConfig.full_size(), lae, **rest
        )
