"""InstantID: the face as tokens, its place as a ControlNet (arXiv:2401.07519)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.embeddings import IPAdapterFaceIDImageProjection
from torch import Tensor

from difflora_core.base_model.diffusers_base import DiffusersBase, time_ids
from difflora_core.base_model.protocol import TextCondition
from difflora_core.training.controlnet import HINT_SCALE, ControlLoRA
from difflora_core.vision.features import FeatureSizes
from difflora_core.vision.keypoint_picture import keypoint_picture

from .base import Baseline, Person, Photos
from .ip_adapter import DecoupledAttention

TOKENS, RANK = 8, 16
PIXELS = 4
"""Of a picture of the demo world for each latent."""


class UnderIdentityNet(DiffusersBase):
    """A base that reads identity tokens (B, T, C), in its own attention and in a ControlNet's.

    Args:
        base: the base. control: the ControlNet. tokens: of the faces. hints: its pictures
            (B, 3, 8 h, 8 w). strength: of both.
    """

    def __init__(
        self,
        base: DiffusersBase,
        control: ControlLoRA,
        tokens: Tensor,
        hints: Tensor,
        strength: float,
    ) -> None:
        super().__init__(base.unet, base.vae, base.encode_prompts, base.scheduler)
        self.control, self.tokens, self.hints = control, tokens, hints
        self.strength = strength

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextCondition) -> Tensor:
        """See `DiffusersBase.predict`; the ControlNet reads the face in place of the prompt."""
        identity = TextCondition(self.tokens, text.pooled)
        skips, middle = self.control(noisy, timesteps, identity, self.hints)
        added = {"text_embeds": text.pooled, "time_ids": time_ids(noisy)}
        output: Tensor = self.unet(
            noisy,
            timesteps,
            (text.context, [self.tokens]),
            added_cond_kwargs=added,
            down_block_additional_residuals=[self.strength * skip for skip in skips],
            mid_block_additional_residual=self.strength * middle,
        ).sample
        return output


class InstantID(Baseline):
    """An IP-Adapter on the face, and a ControlNet on five key points with the face as its text.

    It draws the face where it is in the first photo, as the paper's does.
    """

    source = (
        "InstantID (arXiv:2401.07519): IP-Adapter on the face embedding and IdentityNet, here a "
        "Control-LoRA on five points whose text is the identity tokens"
    )

    def __init__(self, base: DiffusersBase, sizes: FeatureSizes) -> None:
        super().__init__(base, sizes)
        width = base.unet.config.cross_attention_dim
        self.face_tokens = IPAdapterFaceIDImageProjection(sizes.face, width, 2, TOKENS)
        self.attention = DecoupledAttention(base.unet, (TOKENS,))
        self.control = ControlLoRA(base, RANK, torch.Generator().manual_seed(0))
        self.side = base.unet.config.sample_size

    def person(self, photos: Photos) -> Person:
        """Mean tokens of the faces, and the points (B, 5, 2) of what is to follow."""
        people, count = photos.face.shape[:2]
        tokens = self.face_tokens(self.faces(photos).flatten(0, 1))
        mean = tokens.unflatten(0, (people, count)).mean(1)
        return {"tokens": mean, "points": photos.keypoints}

    def hints(self, points: Tensor) -> Tensor:
        """Control pictures (B, 3, 8 h, 8 w) of points (B, 5, 2)."""
        size, grow = self.side * HINT_SCALE, HINT_SCALE // PIXELS
        drawn = [keypoint_picture(face[None] * grow, size, size) for face in points]
        return torch.stack(drawn).permute(0, 3, 1, 2).to(points.device)

    @contextmanager
    def steered(
        self, base: DiffusersBase, person: Person, strength: float
    ) -> Iterator[DiffusersBase]:
        """The base with identity tokens in its cross-attentions and the ControlNet at its side."""
        tokens, hints = person["tokens"], self.hints(person["points"])
        with self.attention.attached(base.unet, strength):
            yield UnderIdentityNet(base, self.control, tokens, hints, strength)
