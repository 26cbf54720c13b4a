"""IP-Adapter: photos as further tokens of every cross-attention (arXiv:2308.06721)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterFaceIDImageProjection, IPAdapterPlusImageProjection
from torch import Tensor, nn

from difflora_core.base_model.diffusers_base import DiffusersBase, time_ids
from difflora_core.base_model.protocol import TextCondition
from difflora_core.vision.features import FeatureSizes

from .base import Baseline, Person, Photos

TOKENS = 4
"""Tokens from the face, and as many from the picture."""
HEAD = 32


class DecoupledAttention(nn.Module):
    """diffusers' processors of all cross-attentions: their own keys and values for image tokens.

    They start as copies of the keys and values for text, as those of the paper do.

    Args:
        unet: of the base. tokens: how many of each kind.
    """

    def __init__(self, unet: nn.Module, tokens: Sequence[int]) -> None:
        super().__init__()
        self.names = [name for name in unet.attn_processors if ".attn2." in name]
        layers = [unet.get_submodule(name.removesuffix(".processor")) for name in self.names]
        self.processors = nn.ModuleList(
            IPAdapterAttnProcessor2_0(
                layer.to_q.out_features, layer.to_k.in_features, num_tokens=tuple(tokens)
            )
            for layer in layers
        )
        for layer, own in zip(layers, self.processors, strict=True):
            for copies, source in ((own.to_k_ip, layer.to_k), (own.to_v_ip, layer.to_v)):
                for copy in copies:
                    copy.weight.data.copy_(source.weight.detach())

    @contextmanager
    def attached(self, unet: nn.Module, strength: float) -> Iterator[None]:
        """The UNet reads image tokens, `strength` times."""
        plain = dict(unet.attn_processors)
        for own in self.processors:
            own.scale = [strength] * len(own.scale)
        try:
            unet.set_attn_processor(
                {**plain, **dict(zip(self.names, self.processors, strict=True))}
            )
            yield
        finally:
            unet.set_attn_processor(plain)


class WithImageTokens(DiffusersBase):
    """A base whose cross-attentions read image tokens, a list of (B, T, C), beside the text."""

    def __init__(self, base: DiffusersBase, tokens: Sequence[Tensor]) -> None:
        super().__init__(base.unet, base.vae, base.encode_prompts, base.scheduler)
        self.tokens = list(tokens)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextCondition) -> Tensor:
        """See `DiffusersBase.predict`."""
        added = {"text_embeds": text.pooled, "time_ids": time_ids(noisy)}
        context = (text.context, self.tokens)
        output: Tensor = self.unet(noisy, timesteps, context, added_cond_kwargs=added).sample
        return output


class IPAdapter(Baseline):
    """Tokens from the face embedding and tokens from the picture, each with own keys and values."""

    source = (
        "IP-Adapter (arXiv:2308.06721) by diffusers' attention processors; the face embedding as "
        "in its FaceID variant, the picture as in Plus; of several photos the mean tokens (ours)"
    )

    def __init__(self, base: DiffusersBase, sizes: FeatureSizes) -> None:
        super().__init__(base, sizes)
        width = base.unet.config.cross_attention_dim
        self.face_tokens = IPAdapterFaceIDImageProjection(sizes.face, width, 2, TOKENS)
        self.picture_tokens = IPAdapterPlusImageProjection(
            embed_dims=sizes.token_dim,
            output_dims=width,
            hidden_dims=width,
            depth=2,
            dim_head=HEAD,
            heads=max(1, width // HEAD),
            num_queries=TOKENS,
            ffn_ratio=2,
        )
        self.attention = DecoupledAttention(base.unet, (TOKENS, TOKENS))

    def person(self, photos: Photos) -> Person:
        """Mean tokens of the photos."""
        people, count = photos.face.shape[:2]
        face = self.face_tokens(self.faces(photos).flatten(0, 1))
        picture = self.picture_tokens(self.token_norm(photos.tokens).flatten(0, 1))
        return {
            name: tokens.unflatten(0, (people, count)).mean(1)
            for name, tokens in (("face", face), ("picture", picture))
        }

    @contextmanager
    def steered(
        self, base: DiffusersBase, person: Person, strength: float
    ) -> Iterator[DiffusersBase]:
        """The base with image tokens in its cross-attentions."""
        with self.attention.attached(base.unet, strength):
            yield WithImageTokens(base, [person["face"], person["picture"]])
