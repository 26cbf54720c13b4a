"""The base models that are known by name: their UNets' configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..demo.networks.base import UNET_CONFIG
from ..errors import ConfigError, shown
from ..lora.layout import SD15_UNET_CONFIG, SDXL_UNET_CONFIG

UNETS: Mapping[str, Mapping[str, Any]] = {
    "sdxl": SDXL_UNET_CONFIG,
    "sd15": SD15_UNET_CONFIG,
    "demo": UNET_CONFIG,
}


def unet_config(base: str) -> Mapping[str, Any]:
    """Configuration of a base model's UNet, for diffusers.

    Raises:
        ConfigError: it is not known here.
    """
    if base not in UNETS:
        raise ConfigError(
            f"The base {shown(base)} is not known here; known are {', '.join(UNETS)}."
        )
    return UNETS[base]
