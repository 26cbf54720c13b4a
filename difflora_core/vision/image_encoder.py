"""General image encoder: the ImageEncoder protocol and CLIP vision through transformers."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import EncoderError
from .preprocess import CLIP_MEAN, CLIP_STD, clip_pixels

# (length of the embedding, tokens, width of a token) to the name an artist knows.
KNOWN_ENCODERS = {
    (768, 257, 1024): "CLIP ViT-L/14",
    (768, 577, 1024): "CLIP ViT-L/14 at 336 px",
    (1024, 257, 1280): "CLIP ViT-H/14",
    (1280, 257, 1664): "CLIP ViT-bigG/14",
    (1152, 729, 1152): "SigLIP so400m at 384 px",
    (1152, 1024, 1152): "SigLIP so400m at 512 px",
    (1024, 257, 1024): "DINOv2 large",
    (1536, 257, 1536): "DINOv2 giant",
}


def describe_encoder(image_dim: int, tokens: int, token_dim: int) -> str:
    """Name an image encoder by its sizes, e.g. "CLIP ViT-H/14 (1024; 257 x 1280)"."""
    name = KNOWN_ENCODERS.get((image_dim, tokens, token_dim), "a CLIP vision")
    return f"{name} ({image_dim}; {tokens} x {token_dim})"


class ImageEncoder(Protocol):
    """Describes the whole look of a picture."""

    @property
    def image_size(self) -> int:
        """Side in pixels of the square that the network sees."""
        ...

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (N, H, W, 3) in [0, 1] to embeddings (N, Di) and token states (N, L, Dt)."""
        ...


class ClipImageEncoder:
    """ImageEncoder over transformers' CLIPVisionModelWithProjection.

    Gives what ComfyUI's CLIP vision gives as `image_embeds` (projected, not normalised) and
    `penultimate_hidden_states` (output of the last layer but one, class token first).

    Args:
        model: A CLIPVisionModelWithProjection; sizes come from its config.
        device: Where it runs.

    Raises:
        EncoderError: the model is of another kind.
    """

    def __init__(self, model: Any, device: str | torch.device = "cpu") -> None:
        config = getattr(model, "config", None)
        if not hasattr(model, "visual_projection") or not hasattr(config, "image_size"):
            raise EncoderError(
                f"A {type(model).__name__} is not a CLIP vision model with projection; the image "
                "encoder needs transformers' CLIPVisionModelWithProjection."
            )
        self.model = model.eval().to(device)
        self.device = torch.device(device)
        self.image_mean, self.image_std = CLIP_MEAN, CLIP_STD

    @property
    def image_size(self) -> int:
        """Side in pixels of the square that the network sees."""
        return int(self.model.config.image_size)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embed pictures.

        Args:
            images: (N, H, W, 3) in [0, 1].

        Returns:
            Embeddings (N, Di) and penultimate token states (N, L, Dt), float32 on the CPU.
        """
        pixels = clip_pixels(images.float(), self.image_size, self.image_mean, self.image_std)
        weight = self.model.visual_projection.weight
        output = self.model(
            pixel_values=pixels.to(device=self.device, dtype=weight.dtype),
            output_hidden_states=True,
        )
        return output.image_embeds.float().cpu(), output.hidden_states[-2].float().cpu()
