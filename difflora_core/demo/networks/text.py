"""The demo's two text encoders and their small vocabulary.

The words are those of the captions. Each keeps the number that CLIP's tokenizer gives it, so in
ComfyUI the ordinary tokenizer is used: the loader spreads our rows over the full table and gives
every other word the row of the unknown word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

PAD, START, UNKNOWN, END = 0, 1, 2, 3
LENGTH = 77
POOLED_DIM = 64

CLIP_NUMBERS = {
    "!": 0,
    "<start>": 49406,
    "<unknown>": -1,
    "<end>": 49407,
} | dict(
    word.split(":")
    for word in (
        ",:267 a:320 an:550 and:537 at:536 background:5994 beard:9052 black:1449 blonde:10711 "
        "blue:1746 brown:2866 cartoon:7651 cat:2368 cup:1937 dark:3144 eyes:3095 face:1710 "
        "flower:4055 glasses:6116 green:1901 grey:5046 hair:2225 hat:3801 head:1375 holding:5050 "
        "in:530 light:1395 long:1538 man:786 neutral:17011 of:539 old:896 on:525 one:637 "
        "orange:4287 painting:3086 people:1047 person:2533 photo:1125 picture:1674 pink:3360 "
        "plain:10709 portrait:5352 purple:5496 red:736 sad:3719 shirt:2523 short:3005 skin:3575 "
        "smiling:9200 striped:22192 surprised:8949 the:518 two:1237 wearing:3309 white:1579 "
        "with:593 woman:2308 yellow:4481 young:1888"
    ).split()
)
"""Every word we know (the first four are special tokens) and its number in CLIP's vocabulary."""

_WORDS = list(CLIP_NUMBERS)


def clip_numbers() -> Tensor:
    """CLIP's token number of each of our rows, -1 for the unknown word: (V,) int64."""
    return torch.tensor([int(number) for number in CLIP_NUMBERS.values()])


def tokenize(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Captions as our token numbers for both encoders: two (B, 77) int64 tensors.

    The first encoder pads with the end token, the second with "!", as SDXL's do.
    """
    first = torch.full((len(captions), LENGTH), END)
    second = torch.full((len(captions), LENGTH), PAD)
    for row, caption in enumerate(captions):
        tokens = torch.tensor([START, *word_numbers(caption)[: LENGTH - 2], END])
        first[row, : len(tokens)] = tokens
        second[row, : len(tokens)] = tokens
    return first, second


def word_numbers(text: str) -> list[int]:
    """Our token number of each word and sign of a text."""
    words = re.findall(r"[a-z]+|[^a-z\s]", text.lower())
    return [_WORDS.index(w) if w in CLIP_NUMBERS else UNKNOWN for w in words]


def text_config(hidden: int, rows: int = len(CLIP_NUMBERS)) -> dict[str, Any]:
    """Configuration of one encoder; the two differ in activation and projection, as SDXL's do."""
    return {
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "projection_dim": POOLED_DIM,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }


def new_text_encoders(
    rows: int = len(CLIP_NUMBERS),
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Untrained encoders of 64 channels each: quick_gelu like CLIP-L, gelu like CLIP-G.

    Args:
        rows: words in the vocabulary.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shared = {**text_config(64, rows), "attn_implementation": "eager"}
    first = CLIPTextConfig(**shared, hidden_act="quick_gelu")
    second = CLIPTextConfig(**shared, hidden_act="gelu")
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def encode(
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], tokens: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning: both penultimate states side by side and the second's pooled vector.

    Returns:
        context (B, 77, 128) and pooled (B, 64).
    """
    first = encoders[0](tokens[0], output_hidden_states=True)
    second = encoders[1](tokens[1], output_hidden_states=True)
    context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    return context, second.text_embeds
