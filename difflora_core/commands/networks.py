"""The networks that `train` trains: SDXL's, or the small ones of the demo world."""

from __future__ import annotations

from collections.abc import Mapping
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
_SMALL: Mapping[str, Mapping[str, Any]] = {
    "functional": {"lae": SMALL_LAE},
    "paper": {"lae": SMALL_PAPER_LAE, "predictor": PredictorConfig(width=32, depth=1)},
}


def network_config(
    sizes: FeatureSizes, full: bool, preset: str = "functional", **about: Any
) -> DiffLoRAConfig:
    """The network for encoders of these sizes: SDXL's, or the demo world's.

    Args:
        sizes: of the encoders.
        full: which one.
        preset: functional or paper.
        about: further fields of `DiffLoRAConfig`, in place of the usual ones.
    """
    if not full:
        dit = DiTConfig(width=96, depth=4, mlp_ratio=2.0)
        return DiffLoRAConfig.demo(
            sizes, **{"dit": dit, "preset": preset, **_SMALL[preset], **about}
        )
    config = DiffLoRAConfig.sdxl(preset=preset, **about)
    mif = replace(
        config.mif,
        face_dim=sizes.face,
        image_dim=sizes.image,
        image_token_count=sizes.tokens,
        token_dim=sizes.token_dim,
    )
    return replace(config, mif=mif)
