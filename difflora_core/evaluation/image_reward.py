"""ImageReward (arXiv:2304.05977): how well a picture would please whoever wrote the prompt.

A folder with `ImageReward.pt` (or the same tensors as .safetensors) of THUDM/ImageReward and the
`vocab.txt` of bert-base-uncased. The network is BLIP's text encoder looking at BLIP's picture
tokens, and a stack of linear layers on its first token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from ..errors import EncoderError, LoRAFileError, shown
from ..storage.safetensors_io import read_file
from ..storage.torch_file import read_torch_file
from ..vision.preprocess import clip_pixels

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw scores on the training data, by which the published ones are normalised."""
WORDS = 35
"""Tokens of a prompt that are read."""
HEAD = 64
"""Features of an attention head, in both of BLIP's networks."""
_PICTURE, _TEXT, _SCORE = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
_RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)
"""BLIP's names in the picture network to those of transformers; the text network has its own."""


class ImageReward:
    """Scores, about -2 to 2.

    Args:
        folder: see the module.
        device: where it computes.

    Raises:
        EncoderError: a file is missing, or holds another network.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        tensors = _tensors(folder)
        self.device = device
        try:
            self.picture = _filled(*_picture_network(_below(tensors, _PICTURE)))
            self.text = _filled(*_text_network(_below(tensors, _TEXT)))
            self.score = _score_layers(_below(tensors, _SCORE))
        except (KeyError, ValueError, RuntimeError) as error:
            raise EncoderError(
                f"{shown(str(folder), 300)} does not hold ImageReward's network "
                f"({shown(str(error), 200)})."
            ) from error
        for part in (self.picture, self.text, self.score):
            part.float().eval().requires_grad_(False).to(device)
        self.side = self.picture.config.image_size
        self.tokenizer = _tokenizer(folder)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """(N, 1) scores of pictures (H, W, 3) in [0, 1] and their prompts."""
        pixels = torch.cat([clip_pixels(picture[None], self.side) for picture in pictures])
        seen = self.picture(pixels.to(self.device)).last_hidden_state
        words = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=WORDS,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        read = self.text(
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state[:, 0]
        return ((self.score(read) - MEAN) / STD).cpu()


def picture_name(name: str) -> str:
    """Name of a weight of BLIP's picture network, as transformers has it."""
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _picture_network(tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """BLIP's vision transformer of the size of its weights, and these."""
    width, _, _, patch = tensors["patch_embed.proj.weight"].shape
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("blocks.")),
        num_attention_heads=width // HEAD,
        image_size=math.isqrt(tensors["pos_embed"].shape[1] - 1) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    return BlipVisionModel(config), {picture_name(n): t for n, t in tensors.items()}


def _text_network(tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """BLIP's BERT with a look at the picture in every layer, of the size of its weights."""
    layer = "encoder.layer."
    words, width = tensors["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=tensors[f"{layer}0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(tensors[f"{layer}0.intermediate.dense.weight"]),
        num_hidden_layers=1 + max(int(n.split(".")[2]) for n in tensors if n.startswith(layer)),
        num_attention_heads=width // HEAD,
        max_position_embeddings=len(tensors["embeddings.position_embeddings.weight"]),
        bos_token_id=0,
        sep_token_id=0,  # neither is used: BERT's tokenizer adds its own
    )
    return BlipTextModel(config, add_pooling_layer=False), dict(tensors)


def _score_layers(tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """The linear layers on the first token; between them training dropped out, nothing else."""
    layers = []
    for number in sorted({int(name.split(".")[0]) for name in tensors}):
        weight = tensors[f"{number}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": tensors[f"{number}.bias"]})
        layers.append(layer)
    return nn.Sequential(*layers)


def _filled(network: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A network with its weights.

    Raises:
        KeyError: one is not there.
        RuntimeError: one has another shape.
    """
    network.load_state_dict({name: tensors[name] for name in network.state_dict()})
    return network


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those under a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of the folder."""
    for name in ("ImageReward.safetensors", "ImageReward.pt"):
        path = folder / name
        if path.is_file() and path.suffix == ".safetensors":
            return dict(read_file(path, "file of ImageReward", EncoderError)[0])
        if path.is_file():
            try:
                return read_torch_file(path)
            except LoRAFileError as error:
                raise EncoderError(str(error)) from error
    raise EncoderError(f"{shown(str(folder), 300)} lacks ImageReward.pt.")


def _tokenizer(folder: Path) -> Any:
    """BERT's tokenizer of the folder's vocabulary."""
    if not (folder / "vocab.txt").is_file():
        raise EncoderError(f"{shown(str(folder), 300)} lacks the vocab.txt of bert-base-uncased.")
    try:
        return BertTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers says in many ways what is wrong
        raise EncoderError(
            f"The vocabulary in {shown(str(folder), 300)} cannot be read: {shown(str(error), 200)}."
        ) from error
