"""The networks that `train` trains: SDXL's, or the small ones of the demo world."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..models.difflora import DiffLoRAConfig
from ..models.dit import DiTConfig
from ..models.lae.config import LAEConfig
from ..models.predictor import PredictorConfig
from ..vision.features import FeatureSizes

SMALL_LAE = LAEConfig(basis_size=40, learn_down=True, encoder="mirror")
"""Trained through the base; LoRAs enter it by a mirror of the decoder, fitted in closed form."""
SMALL_PAPER_LAE = LAEConfig(basis_size=32)
"""Trained on the weights of a corpus."""
LINEAR_LAE = LAEConfig(kind="linear", latent_dim=11, encoder="mirror")
"""Fitted to the weights of a corpus: every further number is more of its noise."""


def network_config(
    sizes: FeatureSizes,
    full: bool,
    preset: str = "functional",
    autoencoder: str = "structured",
    condition_rank: int = 0,
    **about: Any,
) -> DiffLoRAConfig:
    """The network for encoders of these sizes: SDXL's, or the demo world's.

    Args:
        sizes: of the encoders.
        full: which one.
        preset: functional or paper.
        autoencoder: kind of the autoencoder of paper.
        condition_rank: see `DiTConfig`.
        about: further fields of `DiffLoRAConfig`, in place of the usual ones.
    """
    paper = preset == "paper"
    if not full:
        dit = DiTConfig(width=96, depth=4, mlp_ratio=2.0, condition_rank=condition_rank)
        small: dict[str, Any] = {"dit": dit, "lae": SMALL_LAE}
        if paper:
            lae = LINEAR_LAE if autoencoder == "linear" else SMALL_PAPER_LAE
            lae = replace(lae, kind=autoencoder)
            small |= {"lae": lae, "predictor": PredictorConfig(width=32, depth=1)}
        return DiffLoRAConfig.demo(sizes, **{"preset": preset, **small, **about})
    config = DiffLoRAConfig.sdxl(preset=preset, **about)
    config = replace(config, dit=replace(config.dit, condition_rank=condition_rank))
    if paper:
        config = replace(config, lae=replace(config.lae, kind=autoencoder))
    mif = replace(
        config.mif,
        face_dim=sizes.face,
        image_dim=sizes.image,
        image_token_count=sizes.tokens,
        token_dim=sizes.token_dim,
    )
    return replace(config, mif=mif)
